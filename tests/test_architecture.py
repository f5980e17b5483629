import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cmdgen"
# Every import points further down this list, so that no circle can pass. Where two parts could
# stand either way, the code decided: training uses evaluation's metrics, evaluation trains nothing;
# the world renders what data calls a clip; a request is made of a model's configuration
ORDER = (
    *("__main__", "cli", "training", "evaluation", "compression", "pipelines", "store"),
    *("acceleration", "models", "diffusion", "latents", "world", "data", "video", "weights", "headers"),
    *("schema", "metadata", "request", "config", "options", "files"),
)
FILES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "cmdgen_kernels").glob("*.py"))
SOURCES = ("cmdgen", "kernels", "tests")
MOST_PARAMETERS = 8


def module_name(path: Path) -> str:
    """cmdgen/video/read.py -> cmdgen.video.read."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules and names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # a name may be a module: `from cmdgen import config`
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def graph() -> dict[str, set[str]]:
    """The modules of the package -> those that each imports.

    The package itself holds a version, which every module may read, and `load`, which imports what
    it needs when it is called: neither makes a circle.
    """
    modules = {module_name(path): path for path in FILES if path != PACKAGE / "__init__.py"}
    return {
        name: {
            target
            for imported in imports(path)
            for target in (imported, imported.rpartition(".")[0])
            if target in modules
        }
        for name, path in modules.items()
    }


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """A path of modules that ends where it began; empty if there is none."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(edges[path[-1]] - done):
            if target in path:
                return [*path[path.index(target) :], target]
            if circle := search([*path, target]):
                return circle
        done.add(path[-1])
        return []

    return next(filter(None, (search([name]) for name in edges)), [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        top, *rest = module.split(".")
        assert top not in ("diffusers", "transformers"), f"{module} is for tests alone"
        assert part == "cli" or top not in ("typer", "rich"), f"{module} belongs in cli/"
        if top != "cmdgen" or rest == ["__version__"] or part == "__init__":
            continue
        assert rest and rest[0] in ORDER, f"{module} has no place in ORDER"
        assert rest[0] == part or ORDER.index(part) < ORDER.index(rest[0]), f"{part} may not import {module}"


def test_nothing_is_pickled() -> None:
    # reading a pickle can run any code
    for path in (*ROOT.glob("*.py"), *(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "np.load"}, path
        assert not {name.partition(".")[0] for name in imports(path)} & {"pickle", "shelve", "joblib", "dill"}, path


def test_modules_do_not_import_in_a_circle() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle(graph()) == []


def test_only_the_function_that_loads_imports_at_the_top_of_the_package() -> None:
    # at module level it would import torch, and every part of the package with it
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_torch_and_triton_alone(path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        assert top in {"torch", "triton", "cmdgen_kernels", *sys.stdlib_module_names}, module


def test_the_folder_of_the_kernels_is_no_package() -> None:
    # a package called kernels would hide Hugging Face's from transformers and diffusers
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_function_has_a_long_list_of_parameters() -> None:
    # kernels are outside of the package; commands are generated from dataclasses
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert len(names) <= MOST_PARAMETERS, f"{path}:{node.lineno} {node.name}"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would: Triton's interpreter is not loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


# what takes long to import
SLOW = "print(sorted({'torch', 'numpy', 'imageio_ffmpeg'} & set(sys.modules)))"


@pytest.mark.parametrize("module", ["cmdgen", "cmdgen.config", "cmdgen.request", "cmdgen.cli.app"])
def test_importing_what_describes_does_without_torch(module: str) -> None:
    done = run(f"import sys, {module}; {SLOW}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_help_answers_without_torch() -> None:
    code = f"import sys; from cmdgen.cli.app import main\ntry: main(sys.argv[1:])\nfinally: {SLOW}"
    verbs = ("sample", "doctor", "profile", "models", "rehash", "encode", "inspect")
    for arguments in (["--help"], ["--version"], *([verb, "--help"] for verb in verbs)):
        done = run(code, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n[]\n"), done.stdout


def test_what_needs_no_tensor_answers_without_torch(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    save_file({"content": torch.zeros(1, 2, 2), "motion": torch.zeros(1, 2, 4)}, tmp_path / "a.safetensors")
    (tmp_path / "there.mp4").touch()
    mini = str(PACKAGE / "assets" / "mini")
    sample, inside = ["sample", "a dog", "-o"], tmp_path / "b.mp4"
    code = (
        "import sys; from cmdgen.cli.app import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    for arguments, says in (
        (["models", "list"], ""),
        (["models", "show", mini], ""),
        (["models", "show", "cmd-sd21"], ""),
        (["inspect", tmp_path / "a.png"], "holds no metadata of cmdgen"),
        (["inspect", tmp_path / "a.safetensors"], "not latents of cmdgen"),
        ([*sample, tmp_path / "none" / "a.mp4"], "there is no folder"),
        ([*sample, tmp_path / "there.mp4"], "exists"),
        ([*sample, inside, "--model", "nano"], "unknown model 'nano'"),
        ([*sample, inside, "--size", "33x33"], "both sides must be multiples of"),
        ([*sample, inside, "--image", tmp_path / "none.png"], "none.png"),
    ):
        done = run(code, *map(str, arguments))
        assert says in done.stderr and done.stdout.endswith("False\n"), (arguments, done)


@pytest.mark.parametrize("options", [["--dry-run"], ["--steps", "1", "--motion-steps", "1", "--frames", "2"]])
def test_a_sample_does_without_torchs_compiler(tmp_path: Path, options: list[str]) -> None:
    code = "import sys; from cmdgen.cli.app import main\ntry: main(sys.argv[1:])\n"
    code += "finally: print('torch._dynamo' in sys.modules)"
    done = run(code, "sample", "a dog", "-o", str(tmp_path / "a.mp4"), *options)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done


def test_options_are_read_without_pydantic() -> None:
    code = "import sys; from cmdgen.cli.app import main\ntry: main(sys.argv[1:])\n"
    code += "finally: print('pydantic' in sys.modules)"
    done = run(code, "sample", "a dog", "--steps", "x", "-o", "a.mp4")
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == "error: --steps 'x' is not a whole number\n"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch could launch kernels")
def test_without_cuda_models_do_without_triton() -> None:
    done = run(
        "import sys, cmdgen.models.unet, cmdgen.models.autoencoder, cmdgen.pipelines.load\n"
        "print('cmdgen_kernels' in sys.modules, 'triton' in sys.modules)"
    )
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_importing_does_nothing_but_define() -> None:
    names = [module_name(path) for path in FILES if path.name != "__main__.py"]
    names += [f"cmdgen_kernels.{path.stem}" for path in KERNELS if path.stem != "__init__"]
    code = "import os, importlib; before = dict(os.environ)\n"
    code += f"for name in {names}: importlib.import_module(name)\n"
    code += "import torch; assert not torch.cuda.is_initialized(); assert dict(os.environ) == before"
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
