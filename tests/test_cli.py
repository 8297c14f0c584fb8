"""The `fastcap` command as a user meets it: what it prints, where, and with which status."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from fastcap import cli

SMALL = "--steps 4 --width 16 --attention-width 8 --batch-size 8 --validate-every 4 --validate-batches 2".split()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fastcap(monkeypatch, capsys):
    """Runs a command line in this process: fastcap("train", ...) -> (status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastcap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from fastcap import data

    folder = tmp_path_factory.mktemp("scenes")
    data.write_scenes(folder, num_images=40, seed=0)
    return folder


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    from fastcap.train import TrainConfig, train

    out = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(data=str(scenes), out=str(out), steps=4, width=16, batch_size=8, validate_every=0), progress=False)
    return out


def test_help_lists_every_command(fastcap):
    status, out, _ = fastcap("--help")
    assert status == 0
    for command in ("train", "caption", "data", "demo", "bench", "doctor", "--version"):
        assert command in out


def test_every_setting_of_a_run_is_an_option(fastcap, monkeypatch):
    import dataclasses

    from fastcap.train import TrainConfig

    monkeypatch.setenv("COLUMNS", "160")  # in a narrow terminal long names are cut
    status, out, _ = fastcap("train", "--help")
    assert status == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')} " in out
    assert "--resume" in out


def test_version_is_one_line(fastcap):
    status, out, _ = fastcap("--version")
    assert status == 0 and out.startswith("fastcap ") and out.count("\n") == 1


def test_data_train_and_caption_follow_each_other(fastcap, tmp_path):
    status, out, _ = fastcap("data", "scenes", "--out", tmp_path / "scenes", "--num-images", 40)
    assert status == 0 and out.startswith("40 pictures (") and "with 200 captions" in out
    status, out, err = fastcap(
        "train", "--data", tmp_path / "scenes", "--objective", "smile", "--out", tmp_path / "run", *SMALL
    )
    assert status == 0, err
    assert out.splitlines()[0].startswith("4 steps in ") and "greedy captions" in out
    assert "step 4/4  loss" in err and "images/s" in err and "left" in err
    picture = tmp_path / "scenes" / "images" / "scene_000000.png"
    status, out, err = fastcap("caption", "--checkpoint", tmp_path / "run", picture, picture)
    assert status == 0 and err == ""
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == [str(picture)] * 2 and lines[0][1] == lines[1][1]


def test_emoji_without_their_font_are_one_line_and_status_2(fastcap, tmp_path):
    status, out, err = fastcap("data", "emoji", "--out", tmp_path / "emoji", "--font", tmp_path / "none.ttf")
    assert status == 2 and out == "" and err.count("\n") == 1 and "none.ttf" in err


def test_unreadable_pictures_are_listed_and_the_others_captioned(fastcap, trained, scenes, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    good = scenes / "images" / "scene_000001.png"
    status, out, err = fastcap(
        "caption", "--checkpoint", trained, "--beam", 1, good, tmp_path / "bad.png", tmp_path / "none.png", good
    )
    assert status == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(good), str(good)]
    lines = err.splitlines()
    assert lines[0].startswith(f"fastcap.caption: image must be a readable picture, got '{tmp_path / 'bad.png'}'")
    assert lines[1].startswith(f"fastcap.caption: image must be a file, got '{tmp_path / 'none.png'}'; check the path")
    assert lines[2] == "fastcap caption: 2 of 4 pictures could not be read"


@pytest.mark.parametrize("file", ["model.json", "trainer.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_with_a_foreign_file_is_one_line_and_status_2(fastcap, trained, scenes, tmp_path, file):
    shutil.copytree(trained, tmp_path / "copy")
    (folder,) = (tmp_path / "copy" / "checkpoints").glob("step-*")
    (folder / file).write_text("{}")
    status, out, err = fastcap("caption", "--checkpoint", tmp_path / "copy", scenes / "images" / "scene_000001.png")
    assert (status, out) == (2, "")
    assert err.startswith("fastcap.") and str(folder) in err and "; " in err and err.count("\n") == 1


def test_resume_needs_only_the_folder(fastcap, scenes, tmp_path):
    assert fastcap("train", "--data", scenes, "--out", tmp_path / "run", *SMALL)[0] == 0
    status, out, err = fastcap("train", "--out", tmp_path / "run", "--resume")
    assert status == 0 and "resumed at step 4 of 4" in err
    status, _, err = fastcap("train", "--out", tmp_path / "run", "--resume", "--seed", 5)
    assert status == 2
    assert err == (
        "fastcap.train: seed must stay 0, as the run began, got 5; leave it out, or start a new run with --init-from\n"
    )


@pytest.mark.parametrize("model", ["show-attend-tell", "clip"])
def test_a_run_that_was_over_says_nothing_of_a_validation_that_it_never_had(fastcap, scenes, tmp_path, model):
    options = f"--model {model} --steps 1 --width 32 --batch-size 8 --validate-every 0".split()
    assert fastcap("train", "--data", scenes, "--out", tmp_path / "run", *options)[0] == 0
    status, out, _ = fastcap("train", "--out", tmp_path / "run", "--resume", "--validate-every", 1)
    assert status == 0 and out.count("\n") == 1 and out.startswith("1 steps in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "run"], "fastcap.train: --data must be given, got ''; pass --data FOLDER"),
        (["train", "--resume"], "fastcap.train: --out must be given, got ''; pass --out FOLDER"),
        (
            ["train", "--resume", "--out", "run"],
            "fastcap.train: out must hold a checkpoint to resume, got 'run'; start",
        ),
        (
            ["train", "--data", ".", "--out", "run", "--lr", "0"],
            "fastcap.train: lr must be positive and finite, got 0.0",
        ),
        (
            ["train", "--data", ".", "--out", "run", "--memory-budget", "-1"],
            "fastcap.train: memory_budget must be in [0, 1073741824] MB, got -1.0; pass memory_budget=256, or 0 for",
        ),
        (
            ["train", "--data", ".", "--out", "run", "--objective", "smile", "--mle-weight", "0.5"],
            "fastcap.train: mle_weight must be 0 with objective smile, got 0.5; leave it out, or pass --objective smile+mle",
        ),
        (["train", "--data", "none", "--out", "run"], "fastcap.data.karpathy: "),
        (
            ["train", "--data", ".", "--out", "run", "--init-from", "a", "--width", "8"],
            "fastcap.train: --width must come from --init-from, got 8; leave --width out",
        ),
        (
            ["train", "--data", ".", "--out", "run", "--model", "blip", "--pretrained", "none", "--encoder", "conv"],
            "fastcap.train: encoder must be left out with blip, got 'conv'; that model has no such setting to choose",
        ),
        (
            ["train", "--data", ".", "--out", "run", "--model", "blip", "--pretrained", "./none"],
            "fastcap.models: pretrained must be a folder or a hub name that can be loaded, got './none'; check",
        ),
        (
            ["caption", "--checkpoint", "none", "a.png"],
            "fastcap.train: checkpoint must be a checkpoint or the folder of a",
        ),
        (["caption", "--checkpoint", "none", "--batch-size", "0", "a.png"], "fastcap.caption: --batch-size must be at"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(fastcap, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = fastcap(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_the_train_extra_the_command_says_how_to_get_it():
    code = "import sys; sys.modules['typer'] = None; from fastcap.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "fastcap: the command line needs more packages; run: pip install 'fastcap[train]'\n"


def test_without_the_train_extra_the_doctor_reports():
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['fastcap', 'doctor']; from fastcap.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "reference" in done.stdout and not done.stderr


def test_help_imports_neither_transformers_nor_the_loop():
    code = (
        "import sys; sys.argv = ['fastcap', '--help']\nfrom fastcap.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'transformers', 'PIL', 'tokenizers', 'tensorboard', 'fastcap.train.loop'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_demo_leaves_a_run_that_it_did_not_make_alone(tmp_path):
    from fastcap.errors import FastcapError
    from fastcap.train.demo import _fresh

    own = tmp_path / "mle"
    own.mkdir()
    (own / "log.jsonl").write_text("{}")
    with pytest.raises(FastcapError, match="out must hold nothing but an earlier demo"):
        _fresh(own)
    assert (own / "log.jsonl").read_text() == "{}"
    made = _fresh(tmp_path / "new")
    (made / "log.jsonl").write_text("{}")
    assert not (_fresh(made) / "log.jsonl").exists()


def test_a_model_of_precomputed_features_captions_what_its_file_has(fastcap, scenes, tmp_path):
    """Trained and used by the command line alone; regions differ in number, so a batch of them is padded."""
    import json

    import numpy as np

    document = json.loads((scenes / "dataset_scenes.json").read_text())
    ids = [record["imgid"] for record in document["images"]]
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "regions.npz", **{str(i): rng.normal(size=(3 + i % 3, 6)).astype("f4") for i in ids})
    options = ("--features", tmp_path / "regions.npz")
    status, _, err = fastcap("train", "--data", scenes, "--out", tmp_path / "run", *options, "--coverage", 1, *SMALL)
    assert status == 0, err
    status, out, err = fastcap("caption", "--checkpoint", tmp_path / "run", *options, *ids[:5])
    assert status == 0, err
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(i) for i in ids[:5]]
    status, out, err = fastcap("caption", "--checkpoint", tmp_path / "run", *options, ids[0], "no-such-image")
    assert status == 1 and len(out.splitlines()) == 1 and "got 'no-such-image'; pass one such as" in err
    drawn = ("--attention", tmp_path / "a.png")
    status, _, err = fastcap("caption", "--checkpoint", tmp_path / "run", *options, ids[0], *drawn)
    assert status == 2 and "--attention must come without --features" in err
    status, _, err = fastcap("caption", "--checkpoint", tmp_path / "run", ids[0])
    assert status == 2 and "features must be given where the model was trained on them, and only there, got 'none'; " in err
