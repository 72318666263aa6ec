"""The Privacy tab in real Chromium beside a run of ``opacus-ac finetune`` that is still going on."""

import os
import signal
import subprocess
import sys

import tensorboard_browser
from common.tone_dialogues import dialogues, write_jsonl
from tensorboard_browser import points, wait_for
from tiny_chat import save_chat_model

pytestmark = tensorboard_browser.NEEDS_A_BROWSER


def test_curves_of_a_run_are_there_while_it_goes_on_and_grow(tmp_path):
    save_chat_model(tmp_path / "model")
    write_jsonl(tmp_path / "chats.jsonl", dialogues("loving", 300, 0))
    out = tmp_path / "out"
    words = ["--train_file", tmp_path / "chats.jsonl", "--model_name_or_path", tmp_path / "model", "--output_dir", out]
    words += ["--target_epsilon", 8, "--dataset_size", 300, "--max_steps", 4000, "--per_device_train_batch_size", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "opacus_ac", "finetune", *map(str, words)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(out.rglob("events.out.tfevents.*")), 120)
        path = tensorboard_browser.entry_points(tmp_path)
        with (
            tensorboard_browser.serve(out, path) as port,
            tensorboard_browser.chromium(tmp_path / "profile") as driver,
        ):
            wait_for(lambda: tensorboard_browser.open_tab(driver, port) is None, 60)
            before = points(driver, "max_grad_norm")[0]
            wait_for(lambda: points(driver, "max_grad_norm")[0] > before + 2, 60)
            wait_for(lambda: points(driver, "epsilon")[0] > 1, 60)
            assert run.poll() is None  # it is still going on
            assert tensorboard_browser.severe(driver) == []
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130
    finally:
        if run.poll() is None:
            run.kill()
    assert "go on with --resume_from_checkpoint" in run.stderr.read()
