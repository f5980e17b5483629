"""Blocks of a tiny random model are weighed, dropped by what was measured, and compared."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cmdgen.compression.importance import Importance, Row, choose_units, read_importance
from cmdgen.compression.shortcuts import list_layers, list_vdmini, pick_layers, skip_layers
from cmdgen.config import MINI, TinyConfig
from cmdgen.evaluation import compression
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.vae import KlVae
from cmdgen.store.parts import read_model
from tests.evaluation.test_measure import probe_folder  # noqa: F401

SHAPE = ("--clips", 2, "--batch", 2)
TINY = TinyConfig(
    latent_channels=8,
    **{"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3},
    **{"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)},
)


def test_every_block_is_weighed_once_and_what_it_is_worth_decides(
    tiny_model: Path,
    probe_folder: Path,  # noqa: F811
    tmp_path: Path,
    cmdgen,
) -> None:
    path, plot = tmp_path / "importance.json", tmp_path / "map.png"
    command = ("compress", "importance", tiny_model, "-o", path, "--probe", probe_folder, *SHAPE)
    assert cmdgen(*command, "--part", "vae").code == 0
    first = read_importance(path).rows
    assert first[0].unit == "vae.decoder.mid" and first[0].parameters > 0 and first[0].psnr is not None
    done = cmdgen(*command, "--plot", plot, "--json")
    measured = read_importance(path)
    assert done.code == 0 and json.loads(done.out) == json.loads(json.dumps(asdict(measured)))
    # what was measured is not measured again
    assert measured.rows[: len(first)] == first
    units = {row.unit for row in measured.rows}
    assert {"unet.mid", "unet.level", "unet.down.0.0", "unet.attentions.up.1", "vae.decoder.up.2.0"} <= units
    assert Image.open(plot).height > 20 * len(units)
    target = tmp_path / "small"
    drop = ("compress", "prune", tiny_model, "-o", target, "--rule", "measured", "--importance", path)
    done = cmdgen(*drop, "--budget", 0.999999)
    assert done.code == 0, done.err
    assert read_model(target).dropped
    assert "another seed" in cmdgen(*command, "--seed", 5).err
    with pytest.raises(ValueError, match="other weights, captions"):
        replace(measured, data="world", rows=()).resume(path)

    TinyVae(TINY).save_pretrained(tmp_path / "decoder")
    done = cmdgen(
        *("compress", "compare", tiny_model, target, "--decoder", tmp_path / "decoder"),
        *("--probe", probe_folder, *SHAPE, "--json"),
    )
    whole, rule, tiny, small = json.loads(done.out)["rows"]
    assert (whole["psnr"], whole["failed"]) == (None, 0)
    assert all(row["seconds"].keys() == row["share"].keys() for row in (whole, rule, tiny, small))
    assert rule["parameters"]["vae"] < whole["parameters"]["vae"] and tiny["model"].endswith("decoder")
    assert sum(small["parameters"].values()) < sum(whole["parameters"].values())
    assert all(row["psnr"] is not None and math.isfinite(row["frechet"]) for row in (rule, tiny, small))


def test_slow_minutes_of_a_machine_do_not_change_what_a_block_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [[4.0, 3.0], [4.0, 3.0], [9.0, 6.75], [9.0, 4.0], [4.0, 6.75]]
    asked: list[object] = []

    def in_turn(works: tuple[Any, Any], *_: object) -> list[list[float]]:
        for work in works:
            work()
        return rounds

    monkeypatch.setattr(compression, "in_turn", in_turn)
    monkeypatch.setattr(compression, "list_runs", lambda *_: {"unet": (2, asked.append)})
    pipeline: Any = SimpleNamespace(device=torch.device("cpu"))
    plan: Any = None
    assert compression.measure_seconds(pipeline, plan, "unet", "whole", "small") == (8.0, 0.75)
    assert asked == ["whole", "small"]


def row(unit: str, saved: float, distance: float, parameters: int | None = None) -> Row:
    return Row(unit, parameters or len(unit), 1.0, saved, None, None, 0, distance, 0.0, 0.0, 0.0)


def test_least_harm_for_the_time_goes_first_until_the_budget() -> None:
    rows = (
        row("unet.mid", 0.1, 0.0),
        row("unet.level", 0.3, 0.9),
        row("unet.attentions.up.1", 0.2, 0.1),
        row("unet.up.0.0", 0.9, 0.0),
        row("motion.blocks.4", 0.2, 0.5),
        row("vae.decoder.mid", 0.5, 0.0),
    )
    importance = Importance("mini", "", "mini", 1, 1, 0, rows)
    assert choose_units(importance, MINI, 0.95) == ["unet.mid"]
    assert choose_units(importance, MINI, 0.85) == ["unet.mid", "unet.attentions.up.1"]
    # the mid block goes with the innermost level
    assert choose_units(importance, MINI, 0.65) == ["unet.attentions.up.1", "motion.blocks.4", "unet.level"]
    with pytest.raises(ValueError, match=r"more than 0\.5 of the time of unet, motion is left"):
        choose_units(importance, MINI, 0.5)


def test_blocks_of_one_kind_are_taken_to_save_the_same_time() -> None:
    rows = (
        row("motion.blocks.0", 0.5, 0.2, 7),
        row("motion.blocks.1", 0.1, 0.1, 7),
        row("motion.blocks.2", 0.2, 0.3, 7),
    )
    importance = Importance("mini", "", "mini", 1, 1, 0, rows)
    assert choose_units(importance, MINI, 0.7) == ["motion.blocks.1", "motion.blocks.0"]


def test_a_block_saves_a_share_whatever_the_machine_did_beside_it() -> None:
    slow = replace(row("unet.mid", 0.4, 0.15), seconds=4.0)
    rows = (slow, row("unet.attentions.up.1", 0.2, 0.1), replace(row("unet.level", 0.3, 0.9), seconds=0.0))
    importance = Importance("mini", "", "mini", 1, 1, 0, rows)
    # a tenth of the median second, not 0.4 of it: less for its harm than the other
    assert choose_units(importance, MINI, 0.85) == ["unet.attentions.up.1"]
    assert choose_units(importance, MINI, 0.75) == ["unet.attentions.up.1", "unet.mid"]


def test_files_of_importance_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    importance = Importance("mini", "", "mini", 1, 1, 0, (row("unet.mid", 0.1, 0.0),))
    importance.write(path)
    assert read_importance(path) == importance
    data = json.loads(path.read_text())
    for wrong in ({**data, "rows": 3}, {**data, "rows": [{}]}, {**data, "clips": "x"}, {}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"importance\.json is not of cmdgen compress importance: "):
            read_importance(path)


@torch.no_grad()
def test_layers_that_are_shortcuts_leave_the_resampling_alone() -> None:
    vae = KlVae(replace(MINI.vae, block_out_channels=(8, 8, 8), norm_num_groups=4)).eval()
    z, decoder = torch.randn(1, 8, 4, 4), vae.decoder
    whole, small = vae.decode(z), skip_layers(vae, list_layers(vae))
    x = decoder.conv_in(vae.post_quant_conv(z))
    for block in decoder.up_blocks:
        for up in block.upsamplers:
            x = up(x)
    x = decoder.conv_out(torch.nn.functional.silu(decoder.conv_norm_out(x)))
    torch.testing.assert_close(small.decode(z), x)
    # the weights are the same, and the network that they are of is whole
    assert all(a is b for a, b in zip(vae.parameters(), small.parameters(), strict=True))
    assert torch.equal(vae.decode(z), whole)
    # two residual blocks and an attention in the middle, one of two layers in the last block
    assert list_vdmini(vae) == ["decoder.mid", "decoder.up.2.1"]
    assert len(pick_layers(vae, list_vdmini(vae))) == 4


def test_shares_of_time_are_weighted_by_the_whole_models_seconds() -> None:
    parts = ("unet", "motion", "autoencoder", "vae")
    named = {"named": dict.fromkeys(("subject", "motion", "scene"), 100.0), "frechet": 1.0}
    common: dict[str, Any] = {"parameters": dict.fromkeys(parts, 10**6), "psnr": 30.0, "median": 31.0, "failed": 0}
    whole = {"model": "whole", "seconds": dict(zip(parts, (3.0, 1.0, 0.5, 0.5), strict=True))}
    small = {"model": "small", "seconds": dict.fromkeys(parts, 9.0)}
    shares = (dict.fromkeys(parts, 1.0), dict(zip(parts, (0.8, 0.4, 1.0, 0.5), strict=True)))
    rows = [row | common | named | {"share": share} for row, share in zip((whole, small), shares, strict=True)]
    *_, line = compression.list_comparison({"rows": rows, "clips": 2, "seed": 0})
    # 0.8 of three seconds and 0.4 of one, 1 and 0.5 of half a second each
    assert line.split("|")[7:9] == ["    0.70 ", "     0.75 "]
