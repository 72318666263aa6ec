"""Nothing private leaves a run: private values are watched from inside, and searched for in all that it writes."""

import json
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_trainer import generator, rows, trainer
from transformers import Trainer, TrainerCallback

from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.trainer.released import ReleasedLog
from opacus_ac.optimizer.records import RecordSums
from opacus_ac.optimizer.sum_release import SumRelease
from opacus_ac.tensorboard.tags import SCALARS

pytestmark = pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning")
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?")
# Times are random and may look like anything; paths too. The public evaluation has both, training must have none.
TIMES = re.compile(r"\[\d+:\d+<[^,\]]*(, *[?\d.]+ ?(it/s|s/it))?|eval_\w*(runtime|per_second|_time)'?\W+[\d.e+-]+")
RELEASES = {"max_grad_norm", "noisy_clip_rate", "lr_multiplier", "epsilon"}


class Watch(TrainerCallback):
    """Notes what a log must not hold: losses, gradient norms, sizes and token counts of the private batches."""

    def __init__(self):
        self.sums: set[float] = set()  # of batches: searched for with the four digits of a console
        self.records: set[float] = set()  # of records: searched for with six digits
        self.losses: list[float] = []
        self.tokens = self.marked = 0

    def attach(self, monkeypatch, model):
        add_records, add_noise = RecordSums._add_records, SumRelease.add_noise

        def records(optimizer, draw, norms, losses):
            self.losses += losses.tolist()
            self.records |= set(norms.tolist()) | set(losses.tolist())
            self.sums.add(float(losses.mean()))
            add_records(optimizer, draw, norms, losses)

        def noise(optimizer):
            total = float(torch.stack([s.norm() for s in optimizer.source.sums() if s is not None]).norm())
            mean = sum(self.losses) / len(self.losses)
            self.sums |= {total, total / 40, mean, sum(self.losses) / 40, float(len(self.losses))}
            self.sums |= {float(self.tokens), float(self.marked)}
            self.losses, self.marked = [], 0
            add_noise(optimizer)

        def tokens(module, args, kwargs):
            self.tokens += kwargs["input_ids"].numel()
            self.marked += int(kwargs["attention_mask"].sum())

        monkeypatch.setattr(RecordSums, "_add_records", records)
        monkeypatch.setattr(SumRelease, "add_noise", noise)
        model.register_forward_pre_hook(tokens, with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        if found:
            self.sums.add(float(torch.stack(found).norm()))


def numbers(value):
    """Every number in text, JSON, or what torch.load gives."""
    if isinstance(value, bool | None):
        return []
    if isinstance(value, torch.Tensor):
        return value.double().reshape(-1).tolist() if value.numel() <= 8 else []
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, str):
        return [float(number) for number in NUMBER.findall(value)]
    if isinstance(value, dict):
        # The states of seeded test streams, and hashes, are digits without meaning.
        skipped = {"stream", "statistics_stream", "sampling_stream", "files", "digest", "checkpoint_name", "output_dir"}
        skipped |= {key for key in value if re.fullmatch(r"eval.\w*(runtime|per_second|_time)", str(key))}
        return [number for key, item in value.items() if key not in skipped for number in numbers(item)]
    return [number for item in value for number in numbers(item)] if isinstance(value, list | tuple | set) else []


def events(folder):
    """Scalars by tag of the only event file below ``folder``."""
    (file,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def written(folder: Path, printed: str) -> dict[str, list[float]]:
    """All numbers that a run left behind, by where they are."""
    printed = TIMES.sub("", printed.replace(str(folder), ""))
    found = {"console": numbers(printed), "events": numbers(events(folder))}
    for path in folder.rglob("*.json"):
        if path.name not in ("config.json", "generation_config.json"):
            found[str(path.relative_to(folder))] = numbers(json.loads(path.read_text()))
    for path in [*folder.rglob("*.pt"), *folder.rglob("*.pth"), *folder.rglob("training_args.bin")]:
        state = torch.load(path, weights_only=False)
        state = vars(state) if path.name == "training_args.bin" else state
        found[str(path.relative_to(folder))] = numbers(state)
    return found


def leaks(watch, found):
    """Where private values stand: (place, private value)."""

    def near(places, private, tolerance):
        values = torch.tensor(sorted(private), dtype=torch.float64)
        for place, public in places.items():
            for number in public:
                hit = (values - number).abs() <= tolerance * values.abs()
                yield from ((place, float(v)) for v in values[hit])

    return [*near(found, watch.sums, 5e-4), *near(found, watch.records, 1e-6)]


def without(seams, watch):
    """A PrivateTrainer that lacks some of its seams."""

    class Leaky(PrivateTrainer):
        pass

    def compute_loss(self, *args, **kwargs):
        self.seen = PrivateTrainer.compute_loss(self, *args, **kwargs)
        return self.seen

    def training_step(self, *args):
        PrivateTrainer.training_step(self, *args)
        return self.seen.detach()

    if "training_step" in seams:
        Leaky.compute_loss, Leaky.training_step = compute_loss, training_step
    if "floating_point_ops" in seams:
        Leaky.floating_point_ops = lambda self, inputs: watch.tokens - self.state.total_flos - self.current_flos
    for name in set(seams) & {"_get_grad_norm", "log", "_save_rng_state"}:
        setattr(Leaky, name, getattr(Trainer, name))
    return Leaky


def run(folder, monkeypatch, capsys, *, seams=(), mode="bk", settings=None, gate=True, **changes):
    """Three steps of 40 expected records with everything switched on that writes; returns (trainer, watch, numbers)."""
    watch = Watch()
    if not gate:
        monkeypatch.setattr(ReleasedLog, "ask", lambda self, name, value: None)
    options = {"callbacks": [watch], "noise_generator": generator(11), "eval_dataset": rows(8, seed=8)}
    made = trainer(
        folder, model="llama", data=rows(300), cls=without(seams, watch), options=options,
        settings={"grad_sample_mode": mode, "evaluation_is_public": True, **(settings or {})},
        **{"per_device_train_batch_size": 20, "gradient_accumulation_steps": 2, "report_to": ["tensorboard"],
           "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "log_level": "info", "seed": 1234567, **changes},
    )  # fmt: skip
    watch.attach(monkeypatch, made.model)
    print(made.train())
    made.save_model()
    print(made.privacy_report())
    captured = capsys.readouterr()
    watch.printed = captured.out + captured.err
    return made, watch, written(folder, watch.printed)


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("settings", [{}, {"loss_bound": None}, {"target_epsilon": 6.0, "noise_multiplier": None}])
@pytest.mark.parametrize("quiet", [True, False])
def test_no_private_value_is_in_anything_written(mode, settings, quiet, tmp_path, monkeypatch, capsys):
    made, watch, found = run(tmp_path, monkeypatch, capsys, mode=mode, settings=settings, disable_tqdm=quiet)
    assert len(watch.records) > 100
    assert min(len(found[place]) for place in ("console", "events", "checkpoint-2/optimizer.pt")) > 10
    assert leaks(watch, found) == []
    assert not re.search("train_(runtime|samples|steps|tokens)", watch.printed)
    assert not list(tmp_path.rglob("rng_state.pth"))
    assert made.state.total_flos == made.state.num_input_tokens_seen == 0


@pytest.mark.parametrize(
    ("seams", "mode", "place"),
    [
        (("training_step", "log"), "bk", "checkpoint-3/trainer_state.json"),
        (("training_step", "log"), "bk", "events"),
        (("training_step", "log"), "bk", "console"),
        (("_get_grad_norm", "log"), "hooks", "checkpoint-3/trainer_state.json"),
        (("_get_grad_norm", "log"), "hooks", "console"),
        (("floating_point_ops",), "bk", "checkpoint-3/trainer_state.json"),
    ],
)
def test_a_trainer_without_a_seam_is_caught(seams, mode, place, tmp_path, monkeypatch, capsys):
    arguments = {"seams": seams, "mode": mode, "settings": {"loss_bound": None}, "save_steps": 1}
    if "log" in seams:
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match=r"(loss|grad_norm) is logged while private batches are trained on"),
        ):
            run(tmp_path / "refused", patch, capsys, **arguments)
    _, watch, found = run(tmp_path / "leaky", monkeypatch, capsys, gate=False, **arguments)
    assert place in {where for where, _ in leaks(watch, found)}


def test_the_generator_of_the_process_would_be_saved(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, capsys, seams=("_save_rng_state",))
    assert list(tmp_path.rglob("rng_state.pth"))


# ---------------------------------------------------------------- what is shown instead


def test_the_noisy_loss_is_the_training_loss_everywhere(tmp_path, monkeypatch, capsys):
    released = []

    class Note(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            released.append(made.private_optimizer.released)

    made = trainer(tmp_path, options={"callbacks": [Note()]}, max_steps=4, logging_steps=2, report_to=["tensorboard"])
    output = made.train()
    losses = [release.loss for release in released]
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-5)
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    found = events(tmp_path)
    public = set(SCALARS) - {"privacy/epsilon_target", "privacy/remaining_steps"}
    rates = {f"train/{name}" for name in (*RELEASES, "loss", "learning_rate", "epoch", "train_loss")}
    assert {tag for tag in found if not tag.startswith("hparam/")} == public | rates
    assert found["privacy/noisy_loss"] == pytest.approx(losses, rel=1e-6)
    assert found["privacy/max_grad_norm"] == pytest.approx([r.max_grad_norm for r in released], rel=1e-6)
    assert len(found["privacy/epsilon"]) == 3  # before the run, and with each entry of the log
    assert found["privacy/epsilon"][-1] == pytest.approx(made.get_epsilon(), rel=1e-6)


def test_the_event_file_opens_the_privacy_tab_and_does_not_tell_the_time_of_a_step(tmp_path):
    made = trainer(
        tmp_path,
        settings={"target_epsilon": 5.0, "noise_multiplier": None},
        max_steps=4,
        logging_steps=2,
        report_to=["tensorboard"],
    )
    made.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    meta = json.loads(accumulator.Tensors("privacy/meta")[-1].tensor_proto.string_val[0])
    assert meta["private"] is True
    assert meta["target_epsilon"] == 5.0
    statement = accumulator.Tensors("privacy/statement/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert f"({made.get_epsilon():.4f}, 0.001)-differential privacy by privacy loss" in statement
    times = {event.wall_time for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)}
    assert len(times) <= 2  # when the dashboard was opened, and when it took the clock away; not one per step
    assert len(accumulator.Scalars("train/loss")) == 2
    assert [event.value for event in accumulator.Scalars("privacy/remaining_steps")][-1] == 0


def test_without_a_released_loss_none_is_shown(tmp_path):
    made = trainer(tmp_path, settings={"loss_bound": None})
    output = made.train()
    assert output.training_loss != output.training_loss  # NaN
    assert "train_loss" not in output.metrics
    assert not any({"loss", "train_loss"} & set(entry) for entry in made.state.log_history)
    assert any("epsilon" in entry for entry in made.state.log_history)


def test_the_progress_bar_shows_epsilon(tmp_path, capsys):
    trainer(tmp_path, disable_tqdm=False).train()
    assert re.search(r"epsilon=\d+\.\d{3}", capsys.readouterr().err)


def test_an_infinite_epsilon_is_not_logged_as_a_number(tmp_path):
    made = trainer(tmp_path, settings={"noise_multiplier": 0.0})
    made.train()
    assert made.get_epsilon() == float("inf")
    assert not any("epsilon" in entry for entry in made.state.log_history)
