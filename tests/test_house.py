"""The house rules: imports run down the floors, files and functions are short, and a paper file can be copied."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.report import files_line, imports, lines_of, needed_files, papers
from conftest import ROOT

# ---- 1. the tree ------------------------------------------------------------------------------------------

FLOORS = {
    "kernels": 0, "expert_kernels": 0,
    "ssd": 1, "lla": 1, "latent_moe": 1, "nvfp4": 1, "decode_kernels": 1, "unmasking": 1, "arena_hard": 1, "mmmg": 1,
    "nano_hybrid": 2, "ppe": 2,
    "decoding": 3, "rollouts": 3,
    "grpo": 4, "minitron": 4,
    "mdlm_dultra": 5, "ppo_calibration": 5, "asearcher": 5,
    "train": 6, "sample": 6,
}  # fmt: skip
FOLDERS = {"common": 0, "experiments": 6, "benchmarks": 6}  # the floor of each folder's modules
WITHIN = {
    "common": {"common"},
    "experiments": {"experiments", "benchmarks"},
    "benchmarks": {"experiments", "benchmarks"},
}
SAME_FLOOR = {  # who may import whom on its own floor
    "expert_kernels": {"kernels"}, "common": {"kernels"},
    "decode_kernels": {"ssd", "nvfp4"},  # a decode step of Mamba-2 is defined in ssd.py, a packed weight in nvfp4.py
    "rollouts": {"decoding"},  # answers are generated
}  # fmt: skip
LAYERS = {"ssd", "lla", "latent_moe", "nvfp4", "decode_kernels", "unmasking"}  # these import kernels, and nothing else

LIMITS = {"train.py": 500, "kernels.py": 1200, "expert_kernels.py": 1000, "decode_kernels.py": 1000, "ssd.py": 1000,
          "lla.py": 1000, "nvfp4.py": 900}  # fmt: skip
PAPER_LIMIT, FUNCTION_LIMIT, CLASS_LIMIT, README_LIMIT = 700, 60, 200, 200

TOP = sorted(ROOT.glob("*.py"))
FILES = TOP + [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def name_of(path):
    """Returns the module's dotted name: "ssd", "common.data", "common"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def each(paths):
    """Returns a pytest mark that runs a test once for each file."""
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def parsed(path):
    """Returns the file as an ast.Module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def modules(path):
    """Returns the set of our modules that a file imports."""
    return {name_of(file) for file in imports(path)}


def floor(module):
    """Returns the floor of a module of ours."""
    return FOLDERS[module.split(".")[0]] if module.split(".")[0] in FOLDERS else FLOORS[module]


def may_import(module, other):
    """Returns whether DESIGN's floors let `module` import `other`."""
    room, there = module.split(".")[0], other.split(".")[0]
    if there in WITHIN.get(room, ()) or other in SAME_FLOOR.get(room, ()):
        return True
    if room in LAYERS:
        return other in ("kernels", "expert_kernels")
    return floor(other) < floor(module) and there not in ("train", "sample", "experiments", "benchmarks")


# ---- 2. floors and limits ---------------------------------------------------------------------------------


@each(TOP)
def test_every_file_has_its_floor(path):
    assert path.stem in FLOORS, f"{path.name} is on no floor: put it into FLOORS, or into a folder"


@each(FILES)
def test_imports_run_down_the_floors(path):
    module = name_of(path)
    up = [other for other in sorted(modules(path)) if not may_import(module, other)]
    if module.split(".")[0] in ("experiments", "benchmarks"):
        up = [other for other in up if other not in ("train", "sample")]  # an experiment runs the whole house
    assert not up, f"{module} imports {', '.join(up)}"


def test_imports_go_in_no_circle():
    edges = {name: modules(path) for name, path in MODULES.items()}
    while leaves := [name for name, others in edges.items() if not others]:
        edges = {name: others.difference(leaves) for name, others in edges.items() if name not in leaves}
    assert not edges, f"these import each other: {edges}"


@each(TOP)
def test_a_file_is_short_enough_to_read(path):
    limit = LIMITS.get(path.name, PAPER_LIMIT)
    assert lines_of([path]) <= limit, f"{path.name} has {lines_of([path])} lines, its limit is {limit}"


def test_the_readme_is_short_enough_to_read():
    assert lines_of([ROOT / "README.md"]) <= README_LIMIT


def too_long(path, kinds, limit):
    """Returns ["name: lines"] of the definitions that are longer than the limit; decorators are not counted."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, kinds)]
    sizes = {f"{node.name} (line {node.lineno})": node.end_lineno - node.lineno + 1 for node in nodes}
    return [f"{name}: {size} lines" for name, size in sizes.items() if size > limit]


@each(FILES)
def test_a_function_fits_one_screen(path):
    found = too_long(path, (ast.FunctionDef, ast.AsyncFunctionDef), FUNCTION_LIMIT)
    assert not found, f"over {FUNCTION_LIMIT} lines: {found}"


@each(FILES)
def test_a_class_fits_three_screens(path):
    found = too_long(path, ast.ClassDef, CLASS_LIMIT)
    assert not found, f"over {CLASS_LIMIT} lines: {found}"


@each(FILES)
def test_what_is_public_is_explained(path):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    public = [node for node in parsed(path).body if isinstance(node, kinds) and not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(parsed(path)), "no docstring"
    assert not silent, f"no docstring: {silent}"


# ---- 3. a paper file can be copied ------------------------------------------------------------------------

EXAMPLES = {  # ten lines with each, run in a folder with the files that its docstring names and nothing else
    "ssd.py": """
        from ssd import ssd, ssd_recurrent_ref
        x, dt = torch.randn(2, 37, 4, 8), torch.rand(2, 37, 4)
        A, Bmat, Cmat = -torch.rand(4), torch.randn(2, 37, 2, 16), torch.randn(2, 37, 2, 16)
        y = ssd(x, dt, A, Bmat, Cmat, torch.ones(4))
        torch.testing.assert_close(y, ssd_recurrent_ref(x, dt, A, Bmat, Cmat, torch.ones(4)), rtol=1e-4, atol=1e-4)
    """,
    "lla.py": """
        from lla import LocalLinearAttention, lla
        q, k, v = torch.randn(3, 2, 4, 33, 16, requires_grad=True)
        lla(q, k, v, torch.ones(4)).sum().backward()
        layer = LocalLinearAttention(32, 4, head_dim=8)
        assert layer(torch.randn(2, 17, 32)).shape == (2, 17, 32)
    """,
    "latent_moe.py": """
        from latent_moe import MoE, MoEConfig
        layer = MoE(MoEConfig(32, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, latent_size=16))
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x = torch.randn(2, 9, 32, requires_grad=True)
        layer(x).square().mean().backward()
        assert x.grad.isfinite().all()
    """,
    "nvfp4.py": """
        from nvfp4 import RECIPES, QuantizedLinear, dequantize, quantize, quantize_model
        x = torch.randn(32, 64, requires_grad=True)
        q = quantize(x.detach())
        assert 8 * q.nbytes / x.numel() < 4.52 and (dequantize(q) - x).norm() < 0.12 * x.norm()
        model = torch.nn.Sequential(torch.nn.Linear(64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
        assert quantize_model(model, RECIPES["nvfp4"], keep=["2"]) == ["0"] and type(model[0]) is QuantizedLinear
        model(x).square().mean().backward()
        assert x.grad.isfinite().all() and model[0].weight.grad.dtype == torch.float32
    """,
    "nano_hybrid.py": """
        from nano_hybrid import Hybrid, HybridConfig
        torch.manual_seed(0)
        model = Hybrid(HybridConfig(vocab_size=64, hidden_size=32, hybrid_override_pattern="M-*-", head_dim=8,
                                    num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                                    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, chunk_size=16))
        ids = torch.randint(64, (2, 17))
        loss, metrics = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        model.eval()
        tokens = torch.stack(list(model.generate([[1, 2, 3], [4]], max_new_tokens=5, temperature=0)))
        assert tokens.shape == (5, 2)
    """,
    "grpo.py": """
        from grpo import advantages, policy_loss
        logprob = (-torch.rand(4, 6)).requires_grad_()
        A = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), kind="grpo").flatten()
        loss, metrics = policy_loss(logprob, logprob.detach(), A, torch.ones(4, 6), kind="grpo")
        loss.backward()
        assert torch.equal(advantages(torch.ones(2, 4), kind="grpo"), torch.zeros(2, 4))
        assert (logprob.grad[0] < 0).all() and (logprob.grad[1] > 0).all()
    """,
    "mdlm_dultra.py": """
        from mdlm_dultra import MaskedDiffusionLM, PRESETS, decode
        from unmasking import threshold
        from dataclasses import replace
        model = MaskedDiffusionLM(replace(PRESETS["mdlm-tiny"], vocab_size=64)).eval()
        ids = torch.randint(60, (2, 16))
        loss, metrics = model.loss(ids)
        loss.backward()
        masked = torch.full((1, 16), model.mask_id)
        done = decode(model, masked, threshold(0.9))
        assert (done.ids != model.mask_id).all() and 1 <= done.nfe.item() <= 16
    """,
    "arena_hard.py": """
        from arena_hard import bootstrap, bt_ratings, interval, parse_verdict, run, separability, to_battles, win_rate
        questions = [{"uid": str(i), "category": "all", "prompt": "?"} for i in range(9)]
        mine, base = ({"model": m, "answers": {str(i): f"{m} {i}" for i in range(9)}} for m in ("mine", "base"))
        rows = run(questions, mine, base, lambda prompt, a, b: f"[[{'A>B' if int(a[-1]) % 3 else 'B>A'}]]", "out.jsonl")
        battles = to_battles(rows)
        ratings = bt_ratings(battles.a, battles.b, battles.y, 2, anchor=0)
        assert abs(win_rate(ratings, 0)[1] - 50) < 1e-9 and parse_verdict("[[A=B]]") == "A=B"
        ci = interval(bootstrap(battles.a, battles.b, battles.y, 2, anchor=0))
        assert separability(ci) == 0
    """,
    "ppe.py": """
        from ppe import accuracy, best_of_k, correctness_metrics, downstream, human_metrics
        reward, correct = torch.tensor([[0.1, 0.5, 0.3]]), torch.tensor([[False, True, False]])
        assert best_of_k(reward, correct)[-1] == 1
        assert correctness_metrics(reward, correct, [[(0, 1)]])["accuracy"] == 1
        votes = [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 0], [1, 2, 3, 1], [0, 1, 0, 4]
        assert abs(human_metrics(*votes, 2)["spearman"] - 1) < 1e-9
        assert abs(downstream([[0.5], [0.6], [0.9]], [1000, 1010, 1040])["r"] - 1) < 1e-9
    """,
    "mmmg.py": """
        from mmmg import TASKS, aggregate, instructions, perfect, score
        scores = [[score(task, one, perfect(one))] for task in TASKS for one in instructions(task, 1, 0)]
        assert aggregate(scores)[0] > 0.999 and len(TASKS) >= 18
    """,
    "rollouts.py": """
        from rollouts import dpo_loss
        chosen, rejected = torch.randn(2, 5, requires_grad=True)
        loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())
        loss.backward()
        torch.testing.assert_close(loss, torch.tensor(2.0).log())
    """,
    "unmasking.py": """
        from unmasking import softmax_statistics, threshold
        logits = torch.randn(10, 11)
        probs = softmax_statistics(logits)
        torch.testing.assert_close(probs.confidence, logits.softmax(1).amax(1))
        assert torch.equal(threshold(0.5)(probs, torch.ones(10, dtype=bool), None), probs.confidence >= 0.5)
    """,
}


@each(papers())
def test_a_paper_file_says_what_a_copier_takes_along(path):
    files = needed_files(path)
    true = [file.relative_to(ROOT).as_posix() for file in files], lines_of(files)
    assert files_line(path) == true, "run python -m benchmarks.report --files"


@each(papers())
def test_a_paper_file_runs_where_only_its_files_are(path, tmp_path):
    assert path.name in EXAMPLES, f"give {path.name} ten lines in EXAMPLES"
    for name in files_line(path)[0]:
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    code = "import torch\n" + textwrap.dedent(EXAMPLES[path.name])
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    bare |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_rules_find_what_they_forbid(tmp_path):
    main = "if __name__ == '__main__':\n    import train\n"
    source = "import ssd\n" + "def f():\n    pass\n" + "    pass\n" * 60 + main
    path = Path(tmp_path / "x.py")
    path.write_text(source)
    assert too_long(path, ast.FunctionDef, FUNCTION_LIMIT) == ["f (line 2): 62 lines"]
    assert imports(path) == {ROOT / "ssd.py"}
    assert not may_import("ssd", "lla") and not may_import("nano_hybrid", "decoding") and may_import("grpo", "decoding")
    assert not may_import("ssd", "common.data") and not may_import("sample", "train") and may_import("train", "grpo")
