"""SinkCallback in `transformers.Trainer`: the training is the same, and the numbers are those of `measure`."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_tokenizer

pytestmark = pytest.mark.classes
PROBE = {"a": "the quick brown fox", "b": "so it goes, and on"}


def trained(folder, callbacks, make=None):
    model, tokenizer = tiny_hf_model("llama"), tiny_tokenizer()
    model.config.attention_dropout = 0.1
    ids = tokenizer("it was a dark and stormy night; the rain fell")["input_ids"]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=2, seed=0,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids}] * 8
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
    if make is not None:
        trainer.add_callback(make(trainer))
    trainer.train()
    return model, trainer


def test_training_is_the_same_and_the_numbers_are_those_of_measure(tmp_path):
    plain, _ = trained(tmp_path, [])
    probe = ss.SinkCallback(["sink_mass", "sink_rate"], PROBE, every=2)
    model, trainer = trained(tmp_path, [probe])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert model.training
    tokenizer = tiny_tokenizer()
    texts = {label: tokenizer(text)["input_ids"] for label, text in PROBE.items()}
    history = probe.history
    assert history["step"].tolist() == [0, 2, 4]  # the last step is the end: measured once
    for row, network in ((0, tiny_hf_model("llama")), (2, model)):
        expected = ss.measure(network, texts, ["sink_mass", "sink_rate"]).summary("all").set_index("metric")["value"]
        for name in ("sink_mass", "sink_rate@0.3"):
            assert history[name][row] == pytest.approx(expected[name], abs=1e-7)
    assert history["sink_mass"].nunique() == 3
    logged = [entry for entry in trainer.state.log_history if "sink_mass" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    assert [entry["sink_mass"] for entry in logged] == history["sink_mass"].tolist()


def test_the_trainers_loggers_get_them_too(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    def make(trainer):
        return ss.SinkCallback("sink_mass", "so it goes", every=3, log=trainer.log)

    trained(tmp_path, [Logger()], make)
    assert len([logs for logs in seen if "sink_mass" in logs]) == 3  # before the first step, after the third, at the end


def test_it_lives_beside_a_watch(tmp_path):
    """What the callback runs is not the user's code."""
    probe = ss.SinkCallback(["sink_mass"], PROBE, every=2)
    seen = {}

    def make(trainer):
        seen["watch"] = ss.watch(trainer.model, ["sink_mass"]).__enter__()
        return probe

    trained(tmp_path, [], make)
    seen["watch"].__exit__()
    assert seen["watch"].series()["step"].tolist() == [0, 1, 2, 3]
    assert len(probe.history) == 3


@pytest.mark.parametrize(
    ("how", "says"), [({"every": 0, "texts": "so"}, "every=0"), ({}, "needs texts"), ({"texts": []}, "needs")]
)
def test_bad_input(how, says):
    with pytest.raises(ss.SinkscopeError, match=says):
        ss.SinkCallback(["sink_mass"], **how)
