"""The rules of the house: arrows between files, one file that communicates, names that users see, what an import pulls in."""

import ast
import inspect
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import syncbn

PACKAGE = Path(syncbn.__file__).parent
TESTS = Path(__file__).parent

# A file may import those of its own layer's left, and only them; what is not listed is a leaf, which may import all of these.
LAYERS = [
    {"equations", "observing", "_version"},
    {"kernels", "collectives"},
    {"control", "arguments"},
    {"differentiable"},
    {"eager"},
    {"function"},
    {"module"},
    {"names"},
    {"subclass"},
    {"convert"},
]
# What benchmarks compare ours with issues collectives of its own.
COMPARED = [("bench", name) for name in ("peers", "messages", "sync_operators", "fake_world")]
# The commands begin and end a job, by these names of torch.distributed.
COMMANDS = ("analysis", "bench", "demo", "doctor")
OF_A_JOB = {"init_process_group", "destroy_process_group", "barrier", "HashStore"}
OF_A_JOB |= {"get_backend", "get_rank", "get_world_size", "group", "is_nccl_available"}
TRITON = ("triton", "programs", "tiles")  # the files that import it
FRAMEWORKS = {"pytorch_lightning", "lightning", "accelerate", "triton", "numpy", "sklearn", "matplotlib", "tqdm"}


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute names of all modules that a file in `package` imports, lazily or not, and what it takes of torch.distributed."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed."):
            found.add(ast.unparse(node))
    return found


def may_communicate(parts: tuple[str, ...], name: str) -> bool:
    """Whether a file may import a name of torch.distributed."""
    if parts in (("collectives",), ("control",), *COMPARED):
        return True
    if parts[0] in COMMANDS and name.removeprefix("torch.distributed.").split(".")[0] in OF_A_JOB:
        return True
    return parts == ("join",) and name.startswith("torch.distributed.algorithms")


def layer_of(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), len(LAYERS))


def wrong_arrows(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of a file of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = imports(source, ("syncbn", *parts[:-1]))
    mine = layer_of(parts[0])
    wrong = []
    for name in sorted(found):
        head, *rest = name.split(".")
        if head == "syncbn" and rest and parts != ("__init__",) and rest[0] != parts[0]:
            theirs = layer_of(rest[0])
            target = PACKAGE / rest[0]
            is_file = target.is_dir() or target.with_suffix(".py").exists()
            if is_file and theirs >= mine and mine < len(LAYERS):
                wrong.append(f"{'/'.join(parts)} imports {name}")
        if name.startswith("torch.distributed") and not may_communicate(parts, name):
            wrong.append(f"{'/'.join(parts)} imports {name}")
        if head in FRAMEWORKS and mine < len(LAYERS) and not (head == "triton" and parts[-1] in TRITON):
            wrong.append(f"{'/'.join(parts)} imports {name}")
    return wrong


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        assert wrong_arrows(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("equations.py", "from .kernels import aten"),
        ("equations.py", "def f():\n    from . import collectives"),
        ("kernels/aten.py", "from ..function import train"),
        ("collectives.py", "import syncbn.module"),
        ("kernels/__init__.py", "from .. import collectives"),
        ("function.py", "import torch.distributed as dist"),
        ("function.py", "from torch import distributed"),
        ("module.py", "import tqdm"),
        ("steps.py", "import torch.distributed as dist"),
        ("join.py", "import torch.distributed as dist"),
        ("convert.py", "from accelerate import Accelerator"),
        ("bench/step.py", "import torch.distributed as dist"),
        ("module.py", "import torch.distributed as dist"),
        ("module.py", "import torch\ntorch.distributed.all_reduce(x)"),
        ("doctor/run.py", "import torch\ntorch.distributed.all_reduce(x)"),
    ],
)
def test_a_wrong_arrow_is_seen(file, source):
    assert wrong_arrows(PACKAGE / file, source)


@pytest.mark.parametrize("oracle", ["oracle.py", "analysis_oracle.py"])
def test_the_oracles_import_nothing_of_the_package(oracle):
    found = imports((TESTS / oracle).read_text(), ())
    assert {name.split(".")[0] for name in found} <= {"typing", "torch", "collections", "copy", "itertools", "math"}


LIST_NEW_MODULES = """
import sys, torch
torch.nn.modules.batchnorm, torch.distributed.device_mesh
before = set(sys.modules)
{statement}
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""


def new_modules(statement: str) -> set[str]:
    code = LIST_NEW_MODULES.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_importing_syncbn_pulls_in_torch_and_nothing_else():
    assert new_modules("import syncbn") <= {"syncbn", "torch"}


def test_an_import_that_pulls_in_more_is_seen():
    assert new_modules("import syncbn, colorsys") >= {"syncbn", "colorsys"}


def test_public_names():
    assert set(syncbn.__all__) == {
        "CollectiveError",
        "SyncBatchNorm",
        "SyncBatchNorm1d",
        "SyncBatchNorm2d",
        "SyncBatchNorm3d",
        "SyncBatchNormJoin",
        "SyncBatchNormReLU",
        "__version__",
        "accumulate_statistics",
        "checked",
        "checkpoint_context",
        "convert",
        "even_steps",
        "fold",
        "monitor",
        "pool_running_stats",
        "revert",
        "sync_batch_norm",
        "update_bn_stats",
    }
    assert all(hasattr(syncbn, name) for name in syncbn.__all__)
    assert list(inspect.signature(syncbn.convert).parameters) == ["module", "process_group", "group_size", "skip"]
    torchs = inspect.signature(torch.nn.functional.batch_norm).parameters
    ours = inspect.signature(syncbn.sync_batch_norm).parameters
    assert [*torchs, "process_group", "mask", "_force_sync"] == list(ours)
    assert all(ours[name].default == torchs[name].default for name in torchs)


def test_every_public_name_is_documented():
    for name in syncbn.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(syncbn, name)), name


def test_the_private_torch_names_in_use_are_there():
    """The timeout of a group, the mark of what a trace takes as it is, and whether a mode or a transform is active."""
    assert torch.compiler.assume_constant_result(lambda: None)._dynamo_marked_constant
    assert hasattr(torch.distributed.ProcessGroup, "_get_backend")
    assert hasattr(torch.distributed.ProcessGroup, "_device_types")
    assert hasattr(torch._C._distributed_c10d.Backend.Options, "_timeout")
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._are_functorch_transforms_active() is False


BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def test_the_source_distribution_is_the_whole_tree(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    listed = subprocess.run(["git", "ls-files"], cwd=TESTS.parent, capture_output=True, text=True, timeout=20, check=False)
    if not listed.stdout:
        pytest.skip("needs a checkout")
    for name in (there := listed.stdout.splitlines()):
        (copy := tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TESTS.parent / name, copy)
    compiled = tmp_path / "tree" / "tests" / "__pycache__" / "a.pyc"
    compiled.parent.mkdir()
    compiled.write_text("")
    built = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path], cwd=tmp_path / "tree", capture_output=True, text=True, timeout=60, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as found:
        packed = {name.partition("/")[2] for name in found.getnames()}
    assert set(there) - {".gitignore"} <= packed
    assert not any("__pycache__" in name for name in packed)
