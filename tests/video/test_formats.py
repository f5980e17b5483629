import pytest

from cmdgen.video.formats import FORMATS, Encoding, choose_encoding, list_files, list_frames


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *((f"a{suffix}", each.name) for each in FORMATS.values() for suffix in each.suffixes),
        *[("x/A.MP4", "mp4"), ("frame-%04d.png", "frames"), ("%d.png", "frames")],
        *[("100%.png", "png"), ("100%%-%d.png", "frames"), ("-", "y4m")],
    ],
)
def test_the_name_says_the_format(target, name):
    assert choose_encoding(target).format == name


def test_a_format_that_is_said_wins_over_the_name():
    assert choose_encoding("a.mp4", format="gif", loop=2) == Encoding("gif", loop=2)
    assert choose_encoding("-", format="webp").format == "webp"


@pytest.mark.parametrize(
    ("target", "how", "says"),
    [
        ("a.avi", {}, r"a\.avi: the name must end in \.mp4, .*\.webm, .*%04d\.png, or"),
        ("a.mp4", {"format": "avi"}, "format 'avi' is not one of mp4, webm"),
        ("a.gif", {"crf": 20}, "crf 20: gif has none"),
        ("a.mkv", {"crf": 20, "codec": "ffv1"}, "crf 20: ffv1 has none"),
        ("a.mp4", {"crf": 52}, "crf 52 is not one of 0, the best, to 51 for h264"),
        ("a.webm", {"crf": -1}, "crf -1 is not one of 0, the best, to 63 for vp9"),
        ("a.webm", {"codec": "h264"}, "codec 'h264': webm has one of vp9, av1"),
        ("a.gif", {"codec": "h264"}, "codec 'h264': gif has none to choose"),
        ("a.mp4", {"loop": 0}, "loop needs one of gif, webp, apng, not mp4"),
        ("a.gif", {"loop": 65_536}, "loop 65536 is not from 0, for ever, to 65535"),
        ("a.gif", {"loop": -1}, "loop -1 is not from 0"),
        ("a.mp4", {"sidecar": True, "metadata": False}, "sidecar holds the metadata"),
        ("-", {"sidecar": True}, "give a name instead of -"),
        ("-", {"format": "mkv"}, "mkv cannot go to stdout or a pipe: mp4, gif, webp, y4m, raw can"),
        ("-", {"format": "frames"}, "frames cannot go to stdout"),
        ("%d-%d.png", {}, "needs one number in it, such as %04d.png"),
        ("%s%d.png", {}, "needs one number in it, such as %04d.png"),
        ("%099d.png", {}, "needs one number in it, such as %04d.png"),
        ("a.png", {"format": "frames"}, "needs one number in it"),
        ("%04d.jpg", {"format": "frames"}, r"must end in \.png"),
    ],
)
def test_what_cannot_be_is_one_line_that_says_what_can(target, how, says):
    with pytest.raises(ValueError, match=says) as caught:
        choose_encoding(target, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "size", "fps", "says"),
    [
        (Encoding("mp4"), (33, 32), 8, "size 32x33 is odd: mp4 needs even sides"),
        (Encoding("y4m"), (32, 33), 8, "size 33x32 is odd: y4m needs even sides"),
        (Encoding("gif"), (32, 32), 51, "fps 51 is not above 0 and at most 50, as gif needs it"),
        (Encoding("webp"), (32, 16_384), 8, "sides of webp are from 1 to 16383"),
        (Encoding("raw"), (32, 32), 0, "fps 0 is not above 0"),
        (Encoding("raw"), (32, 32), float("nan"), "fps nan is not above 0"),
    ],
)
def test_sizes_and_rates_that_a_format_cannot_hold_are_refused(encoding, size, fps, says):
    with pytest.raises(ValueError, match=says):
        encoding.check(size, fps)
    Encoding("gif").check((33, 31), 50)
    Encoding("mkv", codec="ffv1").check((33, 31), 8)


def test_frames_are_handed_over_as_they_are_stored():
    assert Encoding("mp4").pixels == Encoding("webm").pixels == "yuv420p"
    assert Encoding("gif").pixels == Encoding("mkv", codec="ffv1").pixels == "rgb24"


def test_frames_of_a_sequence_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("a%10000.png", "a%0002.png", "a%0010.png", "a%1.png", "b%0001.png", "a%0003.jpg"):
        (tmp_path / name).touch()
    found = [file.name for file in list_frames(tmp_path / "a%%%04d.png")]
    assert found == ["a%0002.png", "a%0010.png", "a%10000.png"]
    assert list_frames(tmp_path / "none" / "%d.png") == []


def test_a_number_that_a_sequence_lacks_is_named(tmp_path):
    for number in (3, 4, 6, 7):
        (tmp_path / f"a-{number:02d}.png").touch()
    pattern = tmp_path / "a-%02d.png"
    with pytest.raises(ValueError, match=r"a-%02d\.png: a-05\.png is missing, there is a-03\.png to a-07\.png$"):
        list_files(pattern)
    (tmp_path / "a-05.png").touch()
    # another spelling of a number is of no sequence
    (tmp_path / "a-005.png").touch()
    assert [file.name for file in list_files(pattern)] == [f"a-{number:02d}.png" for number in range(3, 8)]
