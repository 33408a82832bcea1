"""The command line is API: words, keys, exit codes, and where each line goes."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import reshard
from reshard import cli
from reshard.demo import make_model


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The demo's model as ``model``, in the current folder: 9 heads, 3 key/value heads, 959 words."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")


@pytest.fixture
def run(capsys):
    def call(command: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(command.split())
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return call


def text(words: str) -> str:
    return textwrap.dedent(words).lstrip("\n")


SHARED = {"ok", "source", "destination", "tensors", "bytes_read", "bytes_written", "peak_buffer_bytes", "files", "dropped", "padded"}


def test_convert_json(model, run):
    code, out, err = run("convert model out --to vllm --tp 3 --json")
    result = json.loads(out)
    assert code == 0 and err == "" and out.count("\n") == 1
    assert set(result) >= SHARED | {"seconds"}
    assert result["source"] == {"path": "model", "format": "hf", "architecture": "LlamaForCausalLM", "mesh": {"tp": 1, "pp": 1, "ep": 1}}
    assert result["destination"] == {
        "path": "out",
        "format": "vllm",
        "architecture": "LlamaForCausalLM",
        "mesh": {"tp": 3, "pp": 1, "ep": 1},
    }
    assert [file["path"] for file in result["files"]] == [f"model-rank-{r}-part-0.safetensors" for r in range(3)]


@pytest.mark.parametrize(
    "target", ["--to vllm --tp 3", "--to megatron --tp 3 --pp 2", "--to tp --tp 9", "--to rank-pt --tp 2", "--to hf --dtype fp32"]
)
def test_the_run_moves_what_plan_said(model, run, target):
    """Bytes, counted where files are read and written, and files on disk."""
    plan = json.loads(run(f"plan model {target} --json")[1])
    dry = json.loads(run(f"convert model out {target} --json -n")[1])
    done = json.loads(run(f"convert model out {target} --json")[1])
    for key in SHARED - {"destination"}:
        assert plan[key] == dry[key] == done[key], key
    assert {f["path"]: f["bytes"] for f in plan["files"]} == {f["path"]: (Path("out") / f["path"]).stat().st_size for f in plan["files"]}
    assert sum(f["bytes"] for f in plan["files"]) == plan["bytes_written"]
    assert [set(row) for row in plan["ranks"]] == [{"rank", "bytes_read", "bytes_written", "bytes_held"}] * len(plan["ranks"])
    assert sum(row["bytes_written"] for row in plan["ranks"]) == plan["bytes_written"]


def test_replicas_are_read_once_more_and_counted(model, run):
    run("convert model nine --to tp --tp 9")
    plan = json.loads(run("plan nine --to hf --json")[1])
    done = json.loads(run("convert nine back --to hf --json")[1])
    assert done["bytes_read"] == plan["bytes_read"] > plan["least_bytes_read"]


def test_plan_of_one_rank(model, run):
    whole = json.loads(run("plan model --to vllm --tp 3 --json")[1])
    for rank in range(3):
        one = json.loads(run(f"plan model --to vllm --tp 3 --rank {rank} --json")[1])
        assert one["ranks"] == [whole["ranks"][rank]]
        assert one["bytes_read"] == whole["ranks"][rank]["bytes_read"] and one["bytes_written"] == whole["ranks"][rank]["bytes_written"]
    code, _, err = run("plan model --to vllm --tp 3 --rank 3")
    assert code == 1 and "rank 3 does not exist on tp3" in err and "ranks are 0 to 2" in err


def test_plan_for_people(model, run):
    code, out, err = run("plan model --to vllm --tp 3 --bandwidth 1GB/s")
    assert code == 0 and err == ""
    assert out == text("""
        model  hf tp1  LlamaForCausalLM
        → (nothing is written)  vllm tp3

        rank  reads      writes     holds
           0  308.93 kB  313.14 kB  308.93 kB
           1  308.93 kB  313.14 kB  308.93 kB
           2  308.74 kB  313.14 kB  308.93 kB

        78 tensors in 3 files, 1.47 MB of buffers at most
        reads 923.14 kB, the least possible
        writes 939.43 kB, 1.0136 × the least possible (headers)
        padded: lm_head.weight
        at 1.00 GB/s: 0.00186 s
        """)


def test_convert_for_people(model, run):
    code, out, err = run("convert model out --to vllm --tp 3")
    assert code == 0 and err == ""
    assert out.startswith("wrote 3 files, ") and out.endswith(": out, vllm tp3\n")
    assert run("convert model quiet --to vllm --tp 3 -q") == (0, "", "")


def test_inspect(model, run):
    run("convert model out --to megatron --tp 3")
    code, out, _ = run("inspect out --json")
    assert code == 0 and json.loads(out) == {
        "ok": True, "path": "out", "format": "megatron", "architecture": "LlamaForCausalLM", "mesh": {"tp": 3, "pp": 1, "ep": 1},
        "tensors": 26, "bytes": json.loads(out)["bytes"],
    }  # fmt: skip
    rows = {row["name"]: row for row in json.loads(run("inspect out --json --tensors")[1])["tensors"]}
    assert rows["decoder.layers.0.self_attention.linear_qkv.weight"] == {
        "name": "decoder.layers.0.self_attention.linear_qkv.weight", "shape": [80, 96], "dtype": "BF16", "split_dim": 0,
        "fused": ["q", "k", "v"], "ranks": [0, 1, 2],
    }  # fmt: skip
    assert rows["decoder.layers.0.mlp.linear_fc2.weight"]["split_dim"] == 1
    assert rows["decoder.final_layernorm.weight"]["split_dim"] is None
    assert run("inspect out")[1] == "out: megatron tp3, LlamaForCausalLM (layout llama), 26 tensors, 963.65 kB\n"


def test_diff(model, run):
    run("convert model out --to megatron --tp 3")
    assert run("diff model out") == (0, "equal: 38 tensors, bit for bit\n", "")
    assert json.loads(run("diff model out --json")[1]) == {
        "ok": True, "equal": True, "tensors": 38, "differing": [], "missing_in_a": [], "missing_in_b": [],
        "bytes_missing_in_a": 0, "bytes_missing_in_b": 0}  # fmt: skip
    stored = next(s for s in reshard.open("model").stored if s.name.endswith("2.self_attn.v_proj.weight"))
    with open("model/model.safetensors", "r+b") as file:
        file.seek(stored.start)
        file.write(bytes(6))
    code, out, err = run("diff model out --json")
    differing = json.loads(out)["differing"]
    assert code == 3 and err == "" and not json.loads(out)["equal"]
    assert [(d["name"], d["elements"]) for d in differing] == [("model.layers.2.self_attn.v_proj.weight", 3)]
    assert set(differing[0]) == {"name", "elements", "max_abs_diff"} and 0 < differing[0]["max_abs_diff"] < 0.2
    code, out, _ = run("diff model out")
    assert code == 3 and out.splitlines()[-1] == "different: 1 of 38 tensors differ, 0 missing"


@pytest.mark.parametrize("command, code, message, hint", [
    ("convert nowhere out --to hf", 1, "nowhere does not exist", None),
    ("convert org/name out --to hf", 1, "org/name does not exist", "did you mean hf://org/name?"),
    ("convert hf://gpt2 out --to hf", 2, "hf://gpt2", "write hf://ORG/gpt2"),
    ("inspect hf://datasets/org/name", 2, "is a dataset, not a model", None),
    ("convert model out --to vllm --tp 2", 1, "cannot split axis kv (3) of q evenly over 2 ranks", "tp sizes that fit this model here: 1, 3"),
    ("convert model out --to hf --tp 2", 1, "format hf is whole: it has no tp2", "--to tp"),
    ("convert model out --to megatron --pp 3", 1, "cannot split 4 layers over pp=3", "use a pp that divides 4"),
    ("convert model out --to megatron --engine-version 0.32", 1, "no meaning for format megatron", "--to vllm"),
    ("convert model model/inside --to tp", 1, "one lies in the other", "choose another"),
    ("convert model out --to vllm --tp 0", 2, "--tp", None),
    ("convert model out --to nothing", 2, "nothing", None),
    ("plan model", 2, "--to", None),
    ("inspect model --layout absent.toml", 2, "absent.toml", None),
    ("layouts show absent", 1, "no layout 'absent'", "deepseek_v3, deepseek_v32"),
])  # fmt: skip
def test_failures(model, run, tmp_path, command, code, message, hint):
    exit_code, out, err = run(command)
    assert exit_code == code and out == "" and message in err and (hint is None or hint in err) and "Traceback" not in err
    if not command.startswith("layouts"):
        exit_code, out, err = run(f"{command} --json")
        result = json.loads(out)
        assert exit_code == code and err == "" and set(result) == {"ok", "error"} and set(result["error"]) == {"type", "message", "hint"}
        assert result["ok"] is False and message in result["error"]["message"] and (hint is None or hint in result["error"]["hint"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"] and len(list((tmp_path / "model").iterdir())) == 2


def test_all_problems_at_once(model, run):
    """Every family of tensors that can't be cut, in one error."""
    _, out, _ = run("convert model out --to vllm --tp 5 --json")
    message = json.loads(out)["error"]["message"]
    assert all(part in message for part in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))


def test_interrupted(model, run, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("reshard.api.plan", interrupt)
    code, out, err = run("convert model out --to hf")
    assert code == 130 and out == "" and err.strip() == "interrupted; run the same command to go on where it stopped"


def test_verbose_shows_where(model, run):
    assert "Traceback" in run("convert nowhere out --to hf -v")[2]


def test_layouts(run, monkeypatch):
    folder = Path(__file__).parents[1] / "layouts"
    pages = sorted(path.stem for path in folder.glob("*.toml") if "architectures" in tomllib.loads(path.read_text()))
    monkeypatch.setenv("COLUMNS", "1000")
    code, out, err = run("layouts")
    assert code == 0 and err == "" and {"llama", "deepseek_v3", "mixtral"} <= set(pages)
    assert [line.split()[0] for line in out.splitlines()] == ["layout", *pages]
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run("layouts")[1].splitlines()
    assert [line for line in narrow if not line.startswith(" ")] == pages and max(map(len, narrow)) <= 80


def test_layouts_show(model, run):
    out = run("layouts show llama --tp 4 --format vllm")[1]
    line = next(line for line in out.splitlines() if "qkv_proj.weight" in line)
    assert line.split("  ")[0] == "model.layers.{layer}.self_attn.qkv_proj.weight"
    assert "q + k + v" in line and "(kv/4 group half pair) hidden" in line
    out = run("layouts show llama --tp 3 --format vllm --config model")[1]
    line = next(line for line in out.splitlines() if "layers.0.self_attn.qkv_proj.weight" in line)
    assert line.split() == ["model.layers.0.self_attn.qkv_proj.weight", "80×96", "0", "q+k+v"]


def test_demo(run):
    code, out, _ = run("demo")
    assert code == 0 and "equal" in out


@pytest.mark.parametrize("command", ["--help", "--version", "layouts"])
def test_start_up_imports_no_torch(command):
    program = f"import sys; from reshard import cli\ntry: cli.main([{command!r}])\nexcept SystemExit: print(sorted({{'torch', 'numpy', 'tqdm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_planning_and_converting_import_no_torch(model):
    program = "import sys, reshard; reshard.convert('model', 'a', format='megatron', tp=3); reshard.convert('a', 'b', format='vllm', tp=3); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("encoding, arrow", [("utf-8", "→"), ("latin-1", r"\u2192"), ("ascii", None)])
def test_a_terminal_without_an_arrow_is_no_traceback(model, encoding, arrow):
    """A locale of ISO 8859-1 ended `plan` in a UnicodeEncodeError."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    args = [sys.executable, "-m", "reshard", "plan", "model", "--to", "vllm", "--tp", "3"]
    done = subprocess.run(args, env=environment, capture_output=True, check=False)
    out = done.stdout.decode("latin-1" if encoding == "latin-1" else "utf-8")  # where all is ASCII, click takes UTF-8
    assert done.returncode == 0 and done.stderr == b"" and "(nothing is written)  vllm tp3" in out and (arrow or "") in out
