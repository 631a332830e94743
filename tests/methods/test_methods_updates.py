"""l2-sp, recadam, sam, llrd: parity with their twins, frozen entries, resume, combinations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.updates import Course, Weights, l2_sp, recadam, sam_gradient
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments, set_seed

from childtuning import Child, ChildConfig, TaskFree
from childtuning.errors import ConfigError
from childtuning.methods import Combination
from childtuning.training import ChildTrainer, LossStep, Method

STEPS, LR, DECAY = 20, 1e-2, 0.1
HEAD = ("head.*",)


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    """Embedding, two blocks, a norm and a head."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.LayerNorm(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.dropout(self.norm(x.mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Sampler[list[int]]):
    """The examples in order, so many a batch."""

    def __init__(self, size: int) -> None:
        self.rows = [list(range(i, i + size)) for i in range(0, 40, size)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "tokens": torch.randint(0, 11, (5,), generator=generator),
            "labels": torch.randint(0, 3, (), generator=generator),
        }
        for _ in range(40)
    ]


def a_net(dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    set_seed(0)
    return Net(**options).to(dtype)


CHILDREN = {
    "full": ChildConfig(density=1.0),
    "child-d": ChildConfig(density=0.3),
    "child-d rows": ChildConfig(density=0.3, granularity="row"),
    "child-f": ChildConfig("task-free", density=0.3),
    "child-f rows": ChildConfig("task-free", density=0.3, granularity="row"),
}


def a_trainer(
    folder: Path,
    net: nn.Module,
    child: ChildConfig,
    methods: str | tuple[Method, ...],
    *,
    accumulation: int = 1,
    always: tuple[str, ...] = HEAD,
    callbacks: Any = (),
    **options: Any,
) -> ChildTrainer:
    generator = torch.Generator().manual_seed(5)
    scores = {
        name: torch.rand(p.shape, generator=generator)
        for name, p in net.named_parameters()
        if not name.startswith("head")
    }
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "warmup_steps": 0.1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_accumulation_steps": accumulation,
    }
    return ChildTrainer(
        net,  # type: ignore[arg-type]
        TrainingArguments(str(folder), **(settings | options)),
        train_dataset=examples(),  # type: ignore[arg-type]
        train_batches=Rows(4 // accumulation),
        child=child,
        always=always,
        scores=scores,
        methods=Combination.parse(methods).methods if isinstance(methods, str) else methods,
        callbacks=list(callbacks),
    )


def weights(net: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


twin_net = cache(a_net)


def loss_gradient(given: Weights, batch: dict[str, Tensor], penalty: float = 0.0) -> Weights:
    leaves = {name: w.clone().requires_grad_() for name, w in given.items()}
    outputs = torch.func.functional_call(twin_net(), leaves, kwargs=batch)
    loss = outputs["loss"] + penalty * outputs["logits"].square().mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def course_of(trainer: ChildTrainer, start: Weights, accumulation: int) -> Course:
    """What the twin is told of a trainer's run: the same batches, schedule, masks and decay."""
    rows, data = Rows(4 // accumulation).rows * 2, examples()
    batches = [
        {key: torch.stack([data[row][key] for row in chosen]) for key in ("tokens", "labels")}
        for chosen in rows
    ]
    warm = STEPS // 10
    rates = [LR * (t / warm if t < warm else (STEPS - t) / (STEPS - warm)) for t in range(STEPS)]
    child = trainer.select()
    shapes = {name: w.shape for name, w in start.items()}
    everything = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}

    def mask(name: str, step: int) -> Tensor:
        if name.startswith("head"):
            return everything[name].double()
        kept = child.mask(name) if isinstance(child, Child) else child.mask(name, shapes[name], step)
        return kept.double() / child.density

    if isinstance(child, Child):
        moves = {name: part.mask() for name, part in child.resolve(shapes).items()}
    else:
        moves = everything
    return Course(
        start=start,
        gradient=loss_gradient,
        batches=[batches[t * accumulation : (t + 1) * accumulation] for t in range(STEPS)],
        rates=rates,
        shares=dict.fromkeys(start, 1.0),
        masks=[{name: mask(name, step) for name in start} for step in range(STEPS)],
        moves=moves,
        decay={name: 0.0 if "bias" in name or "norm" in name else DECAY for name in start},
    )


DEPTH = {"embed": 0, "blocks.0": 1, "blocks.1": 2, "norm": 3, "head": 3}


def twin(methods: str, course: Course) -> Weights:
    """The twin of one of the methods below, or of two of them."""
    head = {name for name in course.start if name.startswith("head")}
    if "llrd" in methods:
        depth = {n: d for n in course.start for prefix, d in DEPTH.items() if n.startswith(prefix)}
        course = replace(course, shares={name: 0.5 ** (3 - depth[name]) for name in course.start})
    if "sam" in methods:
        course = replace(course, gradient=sam_gradient(course.gradient, 0.3, course.moves))
    if "recadam" in methods:
        return recadam(course, head, k=0.5, t0=10, weight=50.0)
    pull = 5.0 if "l2-sp" in methods else 0.0
    return l2_sp(course, {name: 0.0 if name in head else pull for name in course.start})


L2SP, RECADAM, SAM, LLRD = "l2-sp:5", "recadam:k=0.5,t0=10,weight=50", "sam:0.3", "llrd:decay=0.5"
ALONE = [(method, kind) for method in (L2SP, RECADAM, SAM, LLRD) for kind in CHILDREN]
TOGETHER = [
    (f"{L2SP}+{SAM}", "child-d"),
    (f"{LLRD}+{RECADAM}", "child-f"),
    (f"{L2SP}+{LLRD}", "child-d rows"),
]


@pytest.mark.parametrize(("methods", "kind"), ALONE + TOGETHER)
def test_each_follows_its_twin(tmp_path: Path, methods: str, kind: str) -> None:
    net = a_net()
    start = weights(net)
    accumulation = 2 if "sam" in methods else 1
    trainer = a_trainer(tmp_path, net, CHILDREN[kind], methods, accumulation=accumulation)
    trainer.train()
    course = course_of(trainer, start, accumulation)
    expected = twin(methods, course)
    for name, w in weights(net).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-9, atol=1e-11)
        assert torch.equal(w[~course.moves[name]], start[name][~course.moves[name]])
    if kind == "full" or "+" in methods:
        without = twin("", course)
        assert max(float((expected[name] - without[name]).abs().max()) for name in start) > 1e-3
    outside = sum(int((~moves).sum()) for moves in course.moves.values())
    assert (outside > 100) == kind.startswith("child-d")


@pytest.mark.parametrize("kind", ["child-d", "child-f"])
@pytest.mark.parametrize("methods", [L2SP, RECADAM, SAM, LLRD])
def test_resume_in_mid_epoch_is_bitwise(tmp_path: Path, methods: str, kind: str) -> None:
    def run(checkpoint: str | None) -> Weights:
        net = a_net(torch.float32, dropout=0.3)
        trainer = a_trainer(
            tmp_path,
            net,
            CHILDREN[kind],
            methods,
            accumulation=2,
            save_strategy="steps",
            save_steps=5,
            max_steps=12,
            max_grad_norm=1.0,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(net)

    straight, resumed = run(None), run(str(tmp_path / "checkpoint-5"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# l2-sp


def test_the_anchor_costs_what_is_pulled_and_no_more(tmp_path: Path) -> None:
    sizes = {}
    for methods in ("full", L2SP):
        net = a_net(torch.float32)
        config = replace(CHILDREN["child-d"], release_gradients=True)
        trainer = a_trainer(tmp_path, net, config, () if methods == "full" else methods, optim="sgd")
        trainer.train()
        sizes[methods] = trainer.child_optimizer.num_state_bytes
    child = trainer.select()
    assert isinstance(child, Child)
    assert sizes[L2SP] - sizes["full"] == 4 * child.num_trained
    states = trainer.child_optimizer.inner.state
    assert "start" not in states[net.head.weight] and "start" not in states[net.head.bias]


# recadam


def test_recadam_replaces_adamw_alone(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, a_net(), CHILDREN["full"], "recadam", optim="sgd")
    with pytest.raises(ConfigError, match="replaces AdamW, got SGD"):
        trainer.train()


# sam


class Ridge(Method):
    """A term of the loss."""

    part = "loss"

    def loss(self, loss: Tensor, step: LossStep) -> Tensor:
        return loss + 0.5 * step.logits.square().mean()


def test_terms_of_the_loss_are_in_both_passes(tmp_path: Path) -> None:
    net = a_net()
    start = weights(net)
    methods = (Ridge(), *Combination.parse(SAM).methods)
    trainer = a_trainer(tmp_path, net, CHILDREN["child-d"], methods)
    trainer.train()
    course = course_of(trainer, start, 1)
    course.gradient = lambda given, batch: loss_gradient(given, batch, penalty=0.5)
    expected = twin("sam", course)
    for name, w in weights(net).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-9, atol=1e-11)


def at_first_step(tmp_path: Path, net: nn.Module, kind: str) -> tuple[ChildTrainer, Method]:
    trainer = a_trainer(tmp_path, net, CHILDREN[kind], SAM)
    trainer.create_optimizer()
    return trainer, trainer.methods[0]


@pytest.mark.parametrize("kind", ["child-d", "child-f"])
def test_sam_displaces_by_the_radius_restores_the_bits_and_accumulates(tmp_path: Path, kind: str) -> None:
    net = a_net(torch.float32)
    trainer, sam = at_first_step(tmp_path, net, kind)
    start, seen = weights(net), []
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for p in named.values():
        p.grad = torch.full_like(p, 7.0)

    def step() -> Tensor:
        seen.append((weights(net), {name: p.grad for name, p in named.items()}))
        for p in named.values():
            p.grad = (0 if p.grad is None else p.grad) + torch.full_like(p, 3.0)
        return torch.tensor(float(len(seen)))

    assert float(sam.training_step(trainer, step)) == 1.0
    assert all(gradient is None for gradient in seen[0][1].values())
    assert all(torch.equal(seen[0][0][name], start[name]) for name in start)
    child = trainer.select()
    parts = child.resolve({n: w.shape for n, w in start.items()}) if isinstance(child, Child) else {}
    moved = torch.cat([(seen[1][0][name] - start[name]).flatten() for name in start])
    inside = torch.cat([(parts[n].mask() if parts else torch.ones_like(start[n])).flatten() for n in start])
    assert torch.equal(moved != 0, inside.bool())
    assert float(moved.double().norm()) == pytest.approx(0.3, rel=1e-4)
    assert all(torch.equal(w, start[name]) for name, w in weights(net).items())
    assert all(bool((p.grad == 10.0).all()) for p in named.values())  # 7 set aside, and the second pass's 3


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_sam_without_a_direction_stays(tmp_path: Path, value: float) -> None:
    net = a_net(torch.float32)
    trainer, sam = at_first_step(tmp_path, net, "child-d")
    start, passes = weights(net), []

    def step() -> Tensor:
        passes.append(all(torch.equal(w, start[name]) for name, w in weights(net).items()))
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        return torch.tensor(1.0)

    sam.training_step(trainer, step)
    assert passes == [True, True]


def test_sam_restores_when_the_second_pass_fails(tmp_path: Path) -> None:
    net = a_net(torch.float32)
    trainer, sam = at_first_step(tmp_path, net, "child-d")
    start, calls = weights(net), []

    def step() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        return torch.tensor(1.0)

    with pytest.raises(KeyboardInterrupt):
        sam.training_step(trainer, step)
    assert all(torch.equal(w, start[name]) for name, w in weights(net).items())


def test_sam_leaves_running_statistics_of_the_first_pass(tmp_path: Path) -> None:
    found = []
    for methods in ((), Combination.parse(SAM).methods):
        net = a_net(batch_norm=True)
        trainer = a_trainer(tmp_path, net, CHILDREN["full"], methods, max_steps=1)
        trainer.train()
        found.append((net.norm.running_mean, net.norm.running_var, net.norm.num_batches_tracked))
    assert all(torch.equal(plain, sam) for plain, sam in zip(*found, strict=True))
    assert int(found[1][2]) == 1


@pytest.mark.parametrize("kind", ["child-d", "child-d rows"])
def test_frozen_entries_stay_under_autocast(tmp_path: Path, kind: str) -> None:
    net = a_net(torch.float32)
    start = weights(net)
    trainer = a_trainer(tmp_path, net, CHILDREN[kind], f"{L2SP}+{SAM}+{LLRD}", bf16=True, max_grad_norm=1.0)
    trainer.train()
    child = trainer.select()
    assert isinstance(child, Child)
    for name, part in child.resolve({name: w.shape for name, w in start.items()}).items():
        w, outside = weights(net)[name], ~part.mask()
        assert torch.equal(w[outside], start[name][outside])
        assert bool((w != start[name])[part.mask()].any()) or part.is_empty


# llrd


def rates_of(trainer: ChildTrainer) -> dict[str, float]:
    groups = trainer.child_optimizer.param_groups
    return {name: group["lr"] for group in groups for name in group["param_names"]}


def test_llrd_keeps_its_ratios_through_the_schedule_and_spares_what_is_new(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            seen.append(rates_of(trainer))

    seen: list[dict[str, float]] = []
    always = ("head.*", "blocks.0.fc.bias")
    child = CHILDREN["child-f"]
    trainer = a_trainer(tmp_path, a_net(), child, "llrd:0.5", always=always, callbacks=[Look()])
    trainer.train()
    course = course_of(trainer, weights(a_net()), 1)
    assert len(seen) == STEPS
    for rates, rate in zip(seen, course.rates, strict=True):
        assert rates.keys() == course.start.keys()
        for name, got in rates.items():
            depth = 3 if name == "blocks.0.fc.bias" else next(DEPTH[p] for p in DEPTH if name.startswith(p))
            assert got == pytest.approx(rate * 0.5 ** (3 - depth))


def networks() -> dict[str, tuple[Any, dict[str, int]]]:
    """By family: how to make a tiny one, and the number of times that each part's rate decays."""
    import transformers as hf

    small = {"num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    return {
        "bert": (
            lambda: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=20, **small)),
            {
                "bert.embeddings.": 3,
                "bert.encoder.layer.0.": 2,
                "bert.encoder.layer.1.": 1,
                "bert.pooler.": 0,
                "classifier.": 0,
            },
        ),
        "gpt2": (
            lambda: hf.GPT2ForSequenceClassification(
                hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)
            ),
            {
                "transformer.wte.": 3,
                "transformer.wpe.": 3,
                "transformer.h.0.": 2,
                "transformer.h.1.": 1,
                "transformer.ln_f.": 0,
                "score.": 0,
            },
        ),
        "resnet": (
            lambda: hf.ResNetForImageClassification(
                hf.ResNetConfig(
                    embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic", num_labels=2
                )
            ),
            {
                "resnet.embedder.": 5,
                "resnet.encoder.stages.0.layers.0.": 4,
                "resnet.encoder.stages.0.layers.1.": 3,
                "resnet.encoder.stages.1.layers.0.": 2,
                "resnet.encoder.stages.1.layers.1.": 1,
                "classifier.": 0,
            },
        ),
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_llrd_rates_by_name(tmp_path: Path, family: str) -> None:
    make, times = networks()[family]
    model = make()
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.01, use_cpu=True, report_to="none")
    methods = Combination.parse("llrd:decay=0.9").methods
    trainer = ChildTrainer(model, arguments, child=TaskFree(0.5), methods=methods)
    trainer.create_optimizer()
    rates = rates_of(trainer)
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        (decayed,) = [count for prefix, count in times.items() if name.startswith(prefix)]
        assert rate == pytest.approx(0.01 * 0.9**decayed), name


# What is refused


@pytest.mark.parametrize(
    "text",
    [
        "l2-sp:-1",
        "l2-sp:nan",
        "recadam:0",
        "recadam:t0=-1",
        "recadam:weight=-1",
        "recadam:weight=inf",
        "sam:0",
        "sam:inf",
        "llrd:0",
        "llrd:1.1",
        "llrd:nan",
    ],
)
def test_values_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"of '.*got .*\. Pass "):
        Combination.parse(text)


def test_options_under_which_they_would_do_nothing_are_refused(tmp_path: Path) -> None:
    released = replace(CHILDREN["child-d"], release_gradients=True)
    with pytest.raises(ConfigError, match="'sam' needs all gradients in full"):
        a_trainer(tmp_path, a_net(), released, SAM)
    for method in (L2SP, RECADAM):
        with pytest.raises(ConfigError, match="preset='official' has an optimizer of its own"):
            a_trainer(tmp_path, a_net(), ChildConfig(density=0.3, preset="official"), method)
