"""Pulling, against a hub that runs in the test and is asked by huggingface_hub itself."""

import json
import shutil

import pytest
from huggingface_hub import constants

from cmdgen.cli.app import main
from cmdgen.store.hub import cached_folder, choose_adapter, choose_files, find_cached, parse_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SD = [
    *("README.md", "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt"),
    *("rehash.json", "safety_checker/config.json", "safety_checker/model.safetensors"),
    *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("unet/config.json", "unet/diffusion_pytorch_model.bin"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"),
    *("unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json"),
    *("vae/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.fp16.safetensors"),
    *("text_encoder/config.json", "text_encoder/model-00001-of-00002.safetensors"),
    *("text_encoder/model-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.json"),
]


def test_of_a_stock_repository_one_form_of_each_weight_is_chosen() -> None:
    assert choose_files(SD, "sd") == [
        *("README.md", "model_index.json", "rehash.json", "scheduler/scheduler_config.json"),
        *("tokenizer/merges.txt", "tokenizer/vocab.json", "text_encoder/config.json"),
        *("text_encoder/model.safetensors.index.json",),
        *("text_encoder/model-00001-of-00002.safetensors",),
        *("text_encoder/model-00002-of-00002.safetensors",),
        *("unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),
    ]


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_shards_of_a_variant_are_chosen_with_their_index(index: str) -> None:
    shards = [f"text_encoder/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = ["model_index.json", "text_encoder/config.json", f"text_encoder/{index}", *shards]
    assert choose_files(names, "sd")[1:] == [*names[1:]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.ckpt", "README.md"], "a: pickled weights are refused, reading them could run any"),
        (["model_index.json", "vae/config.json", "vae/x.bin"], "vae has no safetensors"),
        (["model_index.json", "vae/config.json"], "a: vae has no diffusion_pytorch_model.safe"),
        (["model.safetensors", "pytorch_model.bin"], "a is no whole model: motion modules need --base OWNER"),
        (["README.md"], "a has no model_index.json: expected"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_downloaded(names, message) -> None:
    with pytest.raises(ValueError, match=message):
        choose_files(names, "a")


def test_of_motion_modules_one_form_is_chosen() -> None:
    whole, half = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    lora = "AnimateLCM_sd15_t2v_lora.safetensors"
    names = ["AnimateLCM_sd15_t2v.ckpt", lora, "README.md", "config.json", "diffusion_pytorch_model.bin", half, whole]
    assert choose_adapter(names, "a", None) == ["README.md", "config.json", half]
    assert choose_adapter(names, "a", None, lora=lora, full=True) == [lora, "README.md", "config.json", whole]
    files = [f"animatediff_lightning_{steps}step_diffusers.safetensors" for steps in (1, 2, 4, 8)]
    assert choose_adapter(["README.md", *files], "a", files[2]) == ["README.md", files[2]]
    with pytest.raises(
        ValueError, match=r"a has no diffusion_pytorch_model\.safetensors: name a file of it with --file"
    ):
        choose_adapter(["README.md", *files], "a", None)


def test_names_that_lead_out_of_the_folder_are_not_chosen() -> None:
    names = ["model_index.json", "vae/../../x.json", "/vae/x.json", "vae/*.json", "vae/a/b.json"]
    assert choose_files(names, "a") == ["model_index.json"]


def test_a_repository_may_have_a_revision() -> None:
    assert parse_name("acme/model") == ("acme/model", "main")
    assert parse_name("acme/model@refs/pr/1") == ("acme/model", "refs/pr/1")
    for wrong in ("a/.b", "-a", "", "a/b/c", "../x", "a/b@", "https://hub/a/b", "a b", "a/b@x@y", "a/..b"):
        with pytest.raises(ValueError, match="is no repository"):
            parse_name(wrong)


def test_a_pulled_model_is_usable_later_without_the_hub(hub, models, monkeypatch, tiny_model, tmp_path) -> None:
    hub.folder = tmp_path / "repository"
    shutil.copytree(tiny_model, hub.folder)
    (hub.folder / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1\n---\n")
    (hub.folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (hub.folder / "huge.safetensors").write_bytes(b"not read")
    wanted = set(hub.names()) - {"unet/diffusion_pytorch_model.bin", "huge.safetensors"}

    code, out, last = models("pull", "acme/model", "-o", str(tmp_path / "copy"))
    assert (code, out) == (0, f"{tmp_path / 'copy'}\n"), last
    assert set(hub.asked) == wanted
    copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*.*")}
    assert {name for name in copied if (tmp_path / "copy" / name).is_file()} == wanted
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))

    # by the name of its branch or its commit
    (snapshot,) = find_cached()
    assert (snapshot.repo, snapshot.commit, snapshot.refs) == ("acme/model", COMMIT, {"main"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("acme/model", "acme/model@main", f"acme/model@{COMMIT}"):
        code, out, _ = models("pull", name)
        assert (code, out) == (0, f"{snapshot.folder}\n")
        code, out, _ = models("show", name, "--json")
        assert code == 0
        assert json.loads(out)["licence"] == "acme-1"
    still = tmp_path / "still.png"
    with pytest.raises(SystemExit) as end:
        main(["sample", "a dog", "-o", str(still), "--model", "acme/model@main"])
    assert not end.value.code
    assert still.is_file()
    _, out, _ = models("list")
    assert out.splitlines()[-1].split()[:2] == ["cached", "acme/model@main"]
    code, out, last = models("pull", "acme/model@v2")
    assert (code, out) == (3, "")
    assert last == "error: HF_HUB_OFFLINE is set; acme/model@v2 is not in the local cache"

    # a bit that flipped on the way to the disk, or there
    weights = snapshot.folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert '"verified": 5, "files": 5' in models("show", "acme/model", "--verify", "--json")[1]
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    code, out, last = models("show", "acme/model", "--verify")
    assert (code, out) == (1, "")
    assert last == f"error: {weights} is damaged: remove {weights.resolve()} and pull it again"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert models("pull", "acme/model") == (1, "", last)

    # as an interrupted download leaves it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (snapshot.folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    code, out, last = models("pull", "acme/model", "-o", str(tmp_path / "second"))
    assert (code, out) == (1, "")
    assert last.endswith("vae/diffusion_pytorch_model.safetensors: No such file or directory")
    assert not (tmp_path / "second").exists()
    _, out, _ = models("list")
    assert "not usable: " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "refusal", "code", "message"),
    [
        ("acme/none", {}, 3, "acme/none is not at HUB, or is private and HF_TOKEN does not open"),
        ("acme/model@v9", {}, 3, "acme/model has no revision 'v9'"),
        (
            "acme/model",
            {"status": 403, "code": "GatedRepo", "files_alone": True},
            1,
            "acme/model is gated: accept its terms at HUB/acme/model, then set HF_TOKEN to",
        ),
        ("acme/model", {"status": 401}, 1, "HF_TOKEN is not accepted for acme/model (status 401)"),
        ("acme/model", {"status": 418}, 3, "HUB answers with status 418; acme/model is not in"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, models, tiny_model, tmp_path, name, refusal, code, message) -> None:
    hub.folder = tiny_model
    for key, value in refusal.items():
        setattr(hub, key, value)
    got, out, last = models("pull", name, "-o", str(tmp_path / "out"))
    assert (got, out) == (code, "")
    assert last.startswith("error: " + message.replace("HUB", constants.ENDPOINT)), last
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_built_is_refused_before_its_weights_come(hub, models, tiny_model, tmp_path) -> None:
    hub.folder = tmp_path / "repository"
    shutil.copytree(tiny_model, hub.folder)
    path = hub.folder / "unet" / "config.json"
    config = {**json.loads(path.read_text()), "transformer_layers_per_block": [1, 2, 10]}
    path.write_text(json.dumps(config))
    code, out, last = models("pull", "acme/model")
    assert (code, out) == (2, "")
    assert "unet/config.json: transformer_layers_per_block [1, 2, 10] is not supported" in last
    assert hub.asked and not any(name.endswith(".safetensors") for name in hub.asked)


def test_without_a_network_one_line_says_so(hub, models, monkeypatch) -> None:
    # nothing listens there
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, out, last = models("pull", "acme/model")
    assert (code, out) == (3, "")
    assert last.startswith("error: http://127.0.0.1:9 cannot be reached (")
    assert cached_folder("acme/model") is None
