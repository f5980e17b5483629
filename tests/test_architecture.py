import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cmdgen"
# an import may point to a later row, or stay in its own
LAYERS = (
    ("cli", "__main__"),
    ("pipeline", "pipelines", "training", "evaluation"),
    ("store",),
    ("acceleration", "compression"),
    ("diffusion", "latents", "models", "data", "video", "weights", "world"),
    ("schema",),
    ("request",),
    ("config", "options", "__init__", "files"),
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "cmdgen_kernels").glob("*.py"))


def part(module: str) -> str:
    """The part of cmdgen that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def imports(path: Path, *, nested: bool) -> set[str]:
    """The modules that a file imports, those imported inside functions too if `nested`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # a name may be a module: `from cmdgen import config`
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path, nested=True):
        top = module.split(".")[0]
        assert top not in ("diffusers", "transformers"), f"{module} is for tests alone"
        assert own == "cli" or top not in ("typer", "rich"), f"{module} belongs in cli/"
        if top == "cmdgen":
            target = part(module) if part(module) in ROW else "__init__"
            assert ROW[own] <= ROW[target], f"{own} may not import {module}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_torch_and_triton_alone(path):
    for module in imports(path, nested=True):
        top = module.split(".")[0]
        assert top in {"torch", "triton", "cmdgen_kernels", *sys.stdlib_module_names}, module


def test_the_folder_of_the_kernels_is_no_package():
    # a package called kernels would hide Hugging Face's from transformers and diffusers
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python of its own, as outside of the tests: Triton's interpreter is not asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )


def test_help_answers_without_torch():
    code = "import sys; from cmdgen.cli.app import main\ntry: main(sys.argv[1:])\nfinally: "
    code += "print(sorted({'torch', 'numpy', 'imageio_ffmpeg'} & set(sys.modules)))"
    for arguments in (
        *(["--help"], ["--version"]),
        *(
            [verb, "--help"]
            for verb in ("sample", "doctor", "profile", "models", "rehash", "encode", "inspect")
        ),
    ):
        done = run(code, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n[]\n"), done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch could launch kernels")
def test_without_cuda_models_do_without_triton():
    done = run(
        "import sys, cmdgen.models.unet, cmdgen.models.autoencoder, cmdgen.pipeline\n"
        "print('cmdgen_kernels' in sys.modules, 'triton' in sys.modules)"
    )
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_importing_does_nothing_but_define():
    names = [
        ".".join((*path.parent.relative_to(top).parts, path.stem))
        for top, paths in ((ROOT, FILES), (ROOT / "kernels", KERNELS))
        for path in paths
    ]
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = "import os, importlib; before = dict(os.environ)\n"
    code += f"for name in {modules}: importlib.import_module(name)\n"
    code += (
        "import torch; assert not torch.cuda.is_initialized(); assert dict(os.environ) == before"
    )
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
