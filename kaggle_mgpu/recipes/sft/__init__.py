"""Fine-tuning language models on conversations: full, with LoRA adapters, or with adapters on 4-bit weights (QLoRA).

    from kaggle_mgpu import launch, train
    from kaggle_mgpu.recipes.sft import Config, Finetune
    task = Finetune(Config(model="/kaggle/input/my-model", data_path="conversations.jsonl", tuning="lora"))
    print(task.describe())
    result = launch(train, task.config, task)
    task.export(result)   # output_dir/adapter, which plain peft loads

Or: `python -m kaggle_mgpu train sft --model FOLDER --data-path conversations.jsonl`, then `python -m kaggle_mgpu merge
OUTPUT_DIR --dtype fp16 --to FOLDER` for one model without adapters. Without a model and data it makes a tiny model on
the spot and teaches it what the functions of Python's standard library do. The parts: data.py (rows, answers, packs),
models.py (loading, adapters, memory), generation.py, rouge.py, output.py (adapter, card, merge).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaggle_mgpu import devices, distributed, strategy
from kaggle_mgpu.config import TrainConfig
from kaggle_mgpu.launch import launch
from kaggle_mgpu.task import Result, Task
from kaggle_mgpu.trainer import train

from . import data, generation, models, output, rouge


@dataclass(frozen=True)
class Config(TrainConfig):
    """How to fine-tune. A sample is a pack of max_length tokens: several conversations, or part of one."""

    MAY_CHANGE = TrainConfig.MAY_CHANGE | set(
        "model data_path val_path tuning backend eval_generate_samples eval_generate_batch_size max_new_tokens".split()
    )
    # Of these, checkpoints are stamped with what matters: `Finetune.name` and `Finetune.backend`

    model: str | None = None
    """A model's folder, the end of one among the Kaggle inputs, or its name on the hub (with the internet on).
    None: a tiny Llama with random weights, made on the spot."""
    tuning: Literal["auto", "full", "lora", "qlora"] = "auto"
    """full: every weight, in fp32; lora: adapters in fp32 on frozen weights; qlora: adapters on 4-bit weights. auto:
    lora; full for the tiny model, whose random weights hold nothing that adapters could bring out."""
    backend: Literal["auto", "hf", "bnb", "unsloth"] = "auto"
    """hf: transformers and peft; bnb: with bitsandbytes, for qlora; unsloth, where installed. auto: hf or bnb."""
    base_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """What frozen weights are held in. auto: the run's precision. Weights that are trained are fp32 in any case."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Their output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters. Above 0 the weights depend on the number of GPUs."""
    lora_targets: str = "auto"
    """Layers with adapters, as "q_proj,v_proj". auto: every linear layer of the model but its head and routers."""
    data_path: str | None = None
    """A .jsonl or .json file of conversations, or a folder of them: rows with messages, with (system,) user and
    assistant, with input and target, or with instruction, (input) and output. None: the largest such file among the
    Kaggle inputs, else questions and answers from the docstrings of Python's standard library."""
    val_path: str | None = None
    """Conversations to evaluate on. None: val_fraction of the data."""
    val_fraction: float = 0.1
    """Share of the conversations held out, those that begin alike on the same side. 0: none."""
    max_length: int = 1024
    """Tokens of a sample. A longer conversation is cut there, and counted."""
    packing: bool = True
    """Fill samples with several conversations, which do not see each other. False: one each, padded in its batch."""
    eval_generate_samples: int = 0
    """Answer so many of the held-out questions at each evaluation, and report ROUGE-L. 0: loss and perplexity only."""
    eval_generate_batch_size: int = 8
    """Questions answered at a time."""
    max_new_tokens: int = 64
    """Tokens of an answer at most."""
    global_batch_size: int | None = 16
    """Packs per optimizer step over all GPUs."""
    epochs: int = 3
    """Passes over the training data. Ignored when max_steps is given."""
    lr: float = 2e-4
    """Peak learning rate: 2e-4 is usual for adapters, a tenth of it for full."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, applied to matrices only."""
    warmup_steps: int | float = 0.03
    """Steps of linear warm-up; below 1 it is a fraction of the run."""
    output_dir: str = "sft"
    """The run's folder: config, data, metrics, logs, checkpoints, weights, adapter, result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {
            "lora_rank": 1, "max_length": 8, "eval_generate_samples": 0, "eval_generate_batch_size": 1,
            "max_new_tokens": 1, "lora_alpha": 0,
        }  # fmt: skip
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"Config.{name}: expected {least} or more, got {getattr(self, name)!r}")
        if not 0 <= self.val_fraction <= 0.5 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                "Config: expected 0 <= val_fraction <= 0.5 and 0 <= lora_dropout < 1, "
                f"got {self.val_fraction} and {self.lora_dropout}"
            )
        fits = {"auto": ("full", "lora", "qlora"), "hf": ("full", "lora"), "bnb": ("qlora",)}
        if self.mode not in fits.get(self.backend, fits["auto"]):
            raise ValueError(
                f"Config: backend={self.backend!r} does not do tuning={self.mode!r}: hf does full and lora, bnb "
                f"(4-bit weights) does qlora, unsloth all three. Leave backend='auto' and it follows from tuning."
            )

    @property
    def mode(self) -> str:
        """tuning, resolved."""
        return self.tuning if self.tuning != "auto" else "lora" if self.model is not None else "full"

    @property
    def library(self) -> str:
        """backend, resolved."""
        return self.backend if self.backend != "auto" else "bnb" if self.mode == "qlora" else "hf"


@dataclass(frozen=True)
class Prepared:
    """Conversations as tokens, in a folder; and the model they are for."""

    folder: str
    model: str
    """Its folder, or its name on the hub."""
    source: str
    digest: str
    """Of tokens and model: what a checkpoint must have been trained on to be gone on with."""
    kind: str
    template: str
    train: int
    """Examples."""
    val: int
    train_tokens: int
    train_learnt: int
    val_learnt: int
    truncated: int
    truncated_tokens: int
    dropped: int


def prepare(config: Config) -> Prepared:
    """Find or make the model, read and encode the conversations; write them under output_dir/data, or find them there.

    Raises:
        ValueError: rows that cannot be read, or none left.
        FileNotFoundError: no such model or data.
    """
    path, reason = data.choose_source(config.data_path)
    if path is None:
        kind, source, conversations = "embedded", "docstrings of the standard library", data.embedded()
    else:
        kind, conversations = data.read_conversations(path)
        source = str(path)
    if config.val_path is not None:
        training, held = conversations, data.read_conversations(Path(config.val_path).expanduser())[1]
    else:
        training, held = data.split(conversations, config.val_fraction)
    texts = hashlib.sha256(json.dumps([training, held]).encode()).hexdigest()
    out = Path(config.output_dir).resolve()
    if config.model is None:
        folder = out / "base" / hashlib.sha256(f"{texts} {config.seed} {models.TINY}".encode()).hexdigest()[:16]
        if not (folder / "config.json").exists():
            with _whole(folder) as temporary:
                words = [message["content"] for conversation in training for message in conversation]
                models.make_tiny(temporary, words, config.seed)
        model = str(folder)
    else:
        model = models.find(config.model)
    tokenizer, template = models.tokenizer(model)
    of_model = models.digest(model)
    settings = json.dumps([2, texts, of_model, tokenizer.chat_template, config.max_length])
    folder = out / "data" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not (folder / "facts.json").exists():
        with _whole(folder) as temporary:
            (temporary / "facts.json").write_text(json.dumps(_encode(temporary, tokenizer, training, held, config)))
    facts = json.loads((folder / "facts.json").read_text())
    digest = hashlib.sha256(f"{facts.pop('digest')} {of_model} {config.packing}".encode()).hexdigest()[:16]
    if not facts["train"] or (held and not facts["val"]):
        raise ValueError(
            f"{source}: nothing to learn: of {len(training)} conversations to train on and {len(held)} held out, "
            f"{facts['train']} and {facts['val']} have an answer within max_length={config.max_length} tokens: raise it"
        )
    return Prepared(
        folder=str(folder), model=model, source=f"{source} ({reason})", kind=kind, template=template, digest=digest,
        **facts,
    )  # fmt: skip


class _whole:  # noqa: N801 (used like a function)
    """A folder that is there with all its files or not at all: it is filled under another name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder.with_suffix(".tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.temporary, self.folder)


def _encode(
    folder: Path, tokenizer: Any, training: list[data.Conversation], held: list[data.Conversation], config: Config
) -> dict[str, Any]:
    facts: dict[str, Any] = {"truncated": 0, "truncated_tokens": 0, "dropped": 0}
    digests = []
    for part, conversations in (("train", training), ("val", held)):
        examples, left_out = data.encode(tokenizer, conversations, config.max_length)
        digests.append(data.write_examples(folder, part, examples))
        facts[part] = len(examples)
        facts[f"{part}_learnt"] = sum(sum(example.learnt[1:]) for example in examples)
        facts["truncated"] += left_out.truncated
        facts["truncated_tokens"] += left_out.tokens
        facts["dropped"] += left_out.dropped
        if part == "train":
            facts["train_tokens"] = sum(len(example.ids) for example in examples)
    return {**facts, "digest": " ".join(digests)}


class Finetune(Task):
    """Next-token prediction on the answers of conversations. Batches: see `data.Packs.batch`."""

    unit = "tokens"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.backend = f"{config.library} {config.mode}"
        self.no_generation = ""
        """Why answers are not generated though they are asked for; "" where they are."""
        if config.eval_generate_samples and config.strategy not in ("auto", "single", "ddp"):
            self.no_generation = f"under strategy {config.strategy!r} no process can call the whole model by itself"
        self._prepared: Prepared | None = None
        self._tools: dict[str, Any] = {}  # what is made when first needed, and not sent to other processes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tools": {}}

    # What is trained on
    @property
    def prepared(self) -> Prepared:
        """Data and model. At first all ranks ask for it together: rank 0 prepares it, the others wait."""
        if self._prepared is None:
            if self.config.library == "unsloth":
                models.require("unsloth")  # before hours of work
            self._prepared = distributed.from_main(lambda: prepare(self.config))
            # Stamps the checkpoints: other data, or another model below the adapters, is another run
            self.name = f"sft {self._prepared.digest}"
        return self._prepared

    @property
    def tokenizer(self) -> Any:
        if "tokenizer" not in self._tools:
            self._tools["tokenizer"] = models.tokenizer(self.prepared.model)[0]
        return self._tools["tokenizer"]

    def examples(self, part: str) -> data.Examples:
        """part: "train" or "val"."""
        return data.Examples(Path(self.prepared.folder), part)

    def _packs(self, part: str) -> data.Packs:
        examples = self.examples(part)
        lengths = examples.lengths
        packs = (
            data.pack(lengths, self.config.max_length) if self.config.packing else [[i] for i in range(len(lengths))]
        )
        return data.Packs(examples, packs, self.sample() if part == "val" and not self.no_generation else ())

    def sample(self) -> list[list[int]]:
        """The held-out examples that are answered: the first eval_generate_samples, in batches."""
        count, size = min(self.config.eval_generate_samples, self.prepared.val), self.config.eval_generate_batch_size
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]

    def train_data(self) -> data.Packs:
        return self._packs("train")

    def val_data(self) -> data.Packs | None:
        return self._packs("val") if self.prepared.val else None

    # The model
    @property
    def precision(self) -> str:
        gpus = devices.gpus() if torch.cuda.is_available() else []
        return devices.precision(self.config.precision, gpus)[0]

    @property
    def base_dtype(self) -> torch.dtype:
        chosen = self.config.base_dtype
        return models.DTYPES[self.precision if chosen == "auto" else chosen]

    def base(self) -> nn.Module:
        """The model that adapters are put on, or that is trained whole."""
        return models.load(
            self.prepared.model,
            tuning=self.config.mode,
            backend=self.config.library,
            base_dtype=self.base_dtype,
            compute_dtype=models.DTYPES[self.precision],
            max_length=self.config.max_length,
            device=distributed.device(),
        )

    def model(self) -> nn.Module:
        model: Any = self.base()
        model.config.use_cache = False  # keys and values of training are used once
        self._tools["implementation"] = getattr(model.config, "_attn_implementation", "")
        picks = models.only_where_asked(model)
        if self.config.mode != "full":
            names = models.targets(model, self.config.lora_targets)
            model = models.adapt(model, names, self.config, self.config.library, self.prepared.model)
        models.checkpoint_activations(model)
        model.picks = picks
        return model

    # The loss
    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits fp32[B, A, vocabulary] of the tokens at batch["at"]; None there: of all, fp32[B, T, vocabulary]."""
        segments, at = batch["segments"], batch.get("at")
        if self.config.packing:
            mask = data.block_mask(segments)
            if model.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
                least = torch.finfo(torch.float32).min
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, least)
            inputs = {"attention_mask": mask, "position_ids": batch["positions"]}
        else:
            inputs = {"attention_mask": (segments > 0).long()}
        head = models.head_of(model) if at is not None and model.picks else None
        if head is not None:
            head.positions = at  # type: ignore[assignment]
        try:
            logits = model(input_ids=batch["ids"], use_cache=False, **inputs).logits
        finally:
            if head is not None:
                head.positions = None  # type: ignore[assignment]
        if at is not None and head is None:
            logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
        return logits.float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy in nats, summed over the tokens of answers, in fp32: an fp16 sum would overflow at 65504."""
        if self.config.packing and "checked" not in self._tools:
            self._tools["checked"] = True
            self.check_packing(model, batch["ids"].device)
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")

    def count(self, batch: dict[str, Tensor]) -> int:
        """Tokens of answers."""
        return int((batch["targets"] != data.IGNORED).sum())

    @torch.no_grad()
    def check_packing(self, model: nn.Module, device: torch.device) -> None:
        """Whether this model keeps packed examples apart: logits of two in a pack against each by itself.

        Raises:
            ValueError: it does not (recurrent layers, sliding windows that ignore masks, no position_ids).
        """
        examples = self.examples("train")
        order = sorted(range(min(len(examples), 200)), key=lambda i: examples.lengths[i])
        pair = [examples[i] for i in (order * 2)[:2]]
        pair = [(ids[:64], learnt[:64]) for ids, learnt in pair]
        training, found = model.training, []
        model.eval()
        try:
            for group in (pair, pair[:1], pair[1:]):
                rows = {name: torch.from_numpy(values)[None] for name, values in data.row_of(group).items()}
                batch = {name: values.to(device).long() for name, values in rows.items() if name != "at"}
                found.append(self.logits(model, batch)[0])
            together, apart = found[0], torch.cat(found[1:])
            difference = float((together - apart).abs().max() / apart.abs().max().clamp(min=1e-9))
            said = f"logits differ by {difference:.2g} of their size from those of each by itself"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # what a model says that takes no mask of this kind
            difference, said = math.inf, f"it takes no block mask ({type(error).__name__}: {error})"
        finally:
            model.train(training)
            torch.clear_autocast_cache()  # else autocast would keep copies of weights that no gradient flows through
        exact = self.precision == "fp32" and self.base_dtype == torch.float32
        if not difference < (1e-3 if exact else 5e-2):
            raise ValueError(
                f"packing=True, but {type(model).__name__} does not keep packed conversations apart: {said}. "
                f"Set packing=False."
            )

    # Evaluation
    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Any, int]]:
        found: dict[str, tuple[Any, int]] = {}
        if len(batch["ids"]):
            found["loss"] = (self.loss(model, batch), self.count(batch))
        asked = batch.get("generate")
        if asked is not None and len(asked):
            found |= self._rouge(model, asked.tolist())
        return found

    def _rouge(self, model: nn.Module, numbers: list[int]) -> dict[str, tuple[Any, int]]:
        """ROUGE-L of the answers to some batches of prompts; and which share of them was answered."""
        total, answered, wanted = 0.0, 0, 0
        reference = self._tools.setdefault("references", self.examples("val").answers())
        sample = self.sample()
        for number in numbers:
            wanted += len(sample[number])
            texts = self._answers(model, number)
            answered += len(texts)
            for index, text in zip(sample[number], texts, strict=False):
                total += rouge.rouge_l(text, reference[index])
        found: dict[str, tuple[Any, int]] = {"answered": (float(answered), wanted)}
        return {**found, "rouge_l": (total, answered)} if answered else found

    def _answers(self, model: nn.Module, number: int) -> list[str]:
        """Answers to one batch of prompts; none where the model cannot generate, which is said once."""
        if self.no_generation:
            return []
        distributed.alive()
        val, indices = self.examples("val"), self.sample()[number]
        stop = generation.stops(self.tokenizer, model, [val[i][0].tolist() for i in indices])
        weights = models.fingerprint(strategy.saved_state(model)) + f" {self.prepared.digest} {self.backend}"
        answers = generation.Answers(Path(self.prepared.folder))
        prompts = [val.prompt(index) for index in indices]
        try:
            return answers.get(
                number, weights, model, self.tokenizer, prompts, max_new_tokens=self.config.max_new_tokens, stop=stop
            )
        except Exception as error:
            self.no_generation = f"{type(error).__name__}: {error}"
            print(f"no answers can be generated ({self.no_generation}): evaluating by loss and perplexity", flush=True)
            return []

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """loss (nats a token), perplexity = exp(loss), and rouge_l where the whole sample was answered."""
        loss = float(metrics["loss"])
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if "rouge_l" in metrics and float(metrics["answered"]) == 1:
            found["rouge_l"] = float(metrics["rouge_l"])
        return found

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`metrics` over the held-out data in this process: of a model before training, say."""
        held = self.val_data()
        if held is None:
            return {}
        totals: dict[str, tuple[float, int]] = {}
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        for start in range(0, len(held), 4):
            batch = held.batch(torch.arange(start, min(start + 4, len(held))))
            for name, (total, count) in self.metrics(model, {k: v.to(device) for k, v in batch.items()}).items():
                before = totals.get(name, (0.0, 0))
                totals[name] = (before[0] + float(total), before[1] + count)
        model.train(training)
        return self.summary({name: torch.tensor(total / count) for name, (total, count) in totals.items()})

    def answers(self, model: nn.Module) -> list[tuple[str, str, str]]:
        """(question, its answer in the data, the model's) for the sample that evaluation answers."""
        val = self.examples("val")
        reference = val.answers()
        found = []
        for number, indices in enumerate(self.sample()):
            for index, text in zip(indices, self._answers(model, number), strict=False):
                question = str(self.tokenizer.decode(val.prompt(index), skip_special_tokens=True))
                found.append((question, reference[index], text))
        return found

    def unigram_loss(self) -> float:
        """Held-out loss of a table of how often each token occurs in training answers, every token once more."""
        counts, held = (self._counts(part) for part in ("train", "val"))
        p = (counts + 1) / (counts.sum() + len(counts))
        return float(-(held * p.log()).sum() / held.sum())

    def _counts(self, part: str) -> Tensor:
        examples = self.examples(part)
        learnt = torch.from_numpy(examples.array("tokens")[examples.array("learnt")]).long()
        return torch.bincount(learnt, minlength=len(self.tokenizer)).double()

    # What there is to say
    def plan(self) -> tuple[models.Estimate, list[str]]:
        """Estimated memory of a GPU, and the layers with adapters."""
        config, packs = self.config, self._packs("train")
        share = (config.global_batch_size or 1) // max(1, int(config.nproc) if config.nproc != "auto" else 1)
        micro = config.micro_batch_size if isinstance(config.micro_batch_size, int) else max(1, share)
        micro = max(1, micro // (config.gradient_accumulation_steps or 1)) if config.micro_batch_size is None else micro
        longest = max(sum(packs.examples.lengths[i] for i in pack) for pack in packs.packs[:100])
        learnt = self.prepared.train_learnt / max(1, self.prepared.train_tokens)
        tokens = micro * longest
        return models.estimate(
            self.prepared.model, config, base_dtype=self.base_dtype, precision=self.precision,
            tokens=tokens, learnt=int(tokens * learnt),
        )  # fmt: skip

    def describe(self) -> str:
        """Model, tuning, data, what did not fit, how full the packs are, and estimated memory; five lines."""
        p, config = self.prepared, self.config
        packs = self._packs("train").packs
        memory, names = self.plan()
        tuned = (
            f"LoRA rank {config.lora_rank} on {', '.join(names)}; base weights in "
            + ("nf4" if config.mode == "qlora" else str(self.base_dtype).removeprefix("torch."))
            if names
            else "every weight"
        )
        full = p.train_tokens / (len(packs) * config.max_length)
        out = f"; {p.truncated} cut at {config.max_length} tokens ({p.truncated_tokens:,} tokens of answers lost)"
        out += f", {p.dropped} dropped: no answer within them" if p.dropped else ""
        asked = f"; ROUGE-L on {sum(map(len, self.sample()))} of them" if self.sample() else ""
        if self.no_generation:
            asked = f"; no answers can be generated ({self.no_generation}): evaluating by loss and perplexity"
        return "\n".join(
            [
                f"model: {p.model}: {memory.parameters:,} parameters, {memory.trainable:,} of them trained "
                f"({self.backend}: {tuned})",
                f"data: {p.source}, {p.kind}: {p.train:,} examples of {p.train_tokens:,} tokens, {p.train_learnt:,} of "
                f"answers{out if p.truncated or p.dropped else '; none cut'}",
                f"template: {p.template}; {len(packs):,} "
                + (f"packs of at most {config.max_length} tokens, {full:.0%} full" if config.packing else "samples")
                + f"; {p.val:,} examples held out{asked}",
                f"memory, estimated for micro-batches as large as they may be: {memory.sentence()}"
                + ("; less activations with a smaller micro_batch_size" if config.micro_batch_size is None else ""),
            ]
        )

    def on_record(self, record: dict[str, Any]) -> None:
        """Adds the memory that rank 0 has used at most to every record."""
        record["peak_memory_mib"] = round(models.peak_memory() / 2**20)

    # What a run leaves
    def load(self, result: Result, which: str = "best") -> nn.Module:
        """The trained model, adapters and all, in this process."""
        return result.load(self.model().to(distributed.device()), which)

    def export(self, result: Result, which: str = "best") -> Path:
        """Write output_dir/adapter as peft does, with tokenizer and model card; for full, the card alone.

        Returns the folder that it wrote to.
        """
        return output.export(self, result, which)


def task(config: Config) -> Task:
    """What the command line trains."""
    return Finetune(config)


def run(config: Config) -> Result:
    """Train, then write the adapter and the model card. What the command line does."""
    distributed.init(timeout=datetime.timedelta(minutes=config.collective_timeout_minutes))  # under torchrun
    made = Finetune(config)
    assert made.prepared  # by all ranks together; what follows is rank 0's alone
    distributed.from_main(lambda: print(made.describe(), flush=True))
    result = launch(train, config, made)
    distributed.from_main(lambda: print(output.farewell(made, result, made.export(result)), flush=True))
    return result


COMMANDS = {"merge": (output.add_arguments, output.merge_command)}
"""Commands of its own: name -> (adds its arguments to a parser, does it and returns the exit code)."""
