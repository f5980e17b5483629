from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmdgen.cli.app import main
from tests.videos import write_video


def preview(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    """-> exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as end:
        main(["data", "preview", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def test_a_sheet_has_a_row_for_each_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        frames = np.full((16, 32, 48, 3), 60 * (number + 1), np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, 8, {})
        (tmp_path / f"{number}.txt").write_text(f"clip {number}")
    sheet = tmp_path / "sheet.png"
    options = ("--data", tmp_path, "--size", "48x32", "--columns", 4)
    code, out, _ = preview(capsys, "-o", sheet, *options)
    assert code in (0, None) and out == f"{sheet}\n"
    picture = np.array(Image.open(sheet))
    # two of the three train: 14 lines of caption, the frames, a gap; 2 columns between frames
    assert picture.shape == (2 * (14 + 32 + 2), 4 * 50 - 2, 3)
    assert np.ptp(picture[16:44, :48]) <= 4 and picture[30, 10].min() > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "64"), "size '64' is not WIDTHxHEIGHT"),
        (("--size", "8x64"), "both sides must be between 16 and 1024"),
        (("--subjects", "dgo"), "unknown subject 'dgo': did you mean"),
        (("--split", "valid"), "split 'valid' is not one of train, test"),
        (("-o", "missing/sheet.png"), "missing does not exist"),
        (("-o", "sheet.jpg"), "sheet.jpg: its name must end in .png"),
        (("--sprites", "sheet.png"), "sheet.png is the sheet: give --sprites another name"),
        (("--data", ".", "--seed", "3"), ". is no rendered world: --seed has no use there"),
        (("--data", ".", "--sprites", "sprites.png"), ". is no rendered world: --sprites has no use there"),
    ],
)
def test_what_is_impossible_is_said_and_nothing_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = preview(capsys, "-o", "sheet.png", *options)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
