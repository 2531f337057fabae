"""`Finetune` is the task of fine-tuning: model, loss, evaluation and description."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaggle_mgpu.data import DEFAULT_GLOBAL_BATCH_SIZE
from kaggle_mgpu.fields import parse_per_gpu
from kaggle_mgpu.machine import devices
from kaggle_mgpu.parallel import distributed, shards
from kaggle_mgpu.training import Result, Task

from . import data, generation, memory, models, output, overflow, rouge
from .config import Config
from .prepare import Prepared, prepare


class Finetune(Task):
    """Finetune predicts the next token of answers in conversations. `data.Packs.batch` describes the batches."""

    unit = "tokens"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.backend = f"{config.library} {config.mode}"
        self.no_generation = ""
        """The reason why no answers are generated although the config asks for some; else ""."""
        if config.eval_generate_samples and config.strategy not in ("auto", "single", "ddp", "fsdp"):
            self.no_generation = f"under strategy {config.strategy!r} no process can call the whole model by itself"
        self._prepared: Prepared | None = None
        self._cache: dict[str, Any] = {}  # made on first use, and not pickled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    # Data
    @property
    def prepared(self) -> Prepared:
        """Return the prepared data and model. All ranks must make the first call together; rank 0 prepares."""
        if self._prepared is None:
            models.check_installed(self.config.mode, self.config.library)
            self._prepared = distributed.from_main(lambda: prepare(self.config))
            # checkpoints store the name, so that a run does not continue with other data or another base model
            self.name = f"sft {self._prepared.digest}"
        return self._prepared

    @property
    def tokenizer(self) -> Any:
        if "tokenizer" not in self._cache:
            self._cache["tokenizer"] = models.tokenizer(self.prepared.model)[0]
        return self._cache["tokenizer"]

    def examples(self, part: str) -> data.Examples:
        """Return the examples of a part, "train" or "val"."""
        return data.Examples(Path(self.prepared.folder), part)

    def _packs(self, part: str) -> data.Packs:
        examples = self.examples(part)
        lengths = examples.lengths
        packs = (
            data.pack(lengths, self.config.max_length) if self.config.packing else [[i] for i in range(len(lengths))]
        )
        made = data.Packs(examples, packs, self.prompt_batches() if part == "val" and not self.no_generation else ())
        if part == "train" and not self.config.packing:
            made.sample_lengths = lengths  # samples are padded, so similar lengths go together
        return made

    def prompt_batches(self) -> list[list[int]]:
        """Return the indices of the held-out examples to answer, the first eval_generate_samples, in batches."""
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
        """Load the model without adapters."""
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
        model.config.use_cache = False  # training never reuses keys and values
        selects_positions = models.select_positions(model)
        if self.config.mode != "full":
            names = models.targets(model, self.config.lora_targets)
            model = models.adapt(model, names, self.config, self.config.library, self.prepared.model)
        models.checkpoint_activations(model)
        model.selects_positions = selects_positions
        # unsloth prevents overflows itself, and deepspeed makes all weights fp16
        if self.precision == "fp16" and self.config.library != "unsloth" and self.config.strategy != "deepspeed":
            self._mend_overflows(model)
        return model

    def _mend_overflows(self, model: nn.Module) -> None:
        """Let modules that overflow in fp16 compute in fp32, and print their names.

        A forward pass on the first two packs finds them; the packs are the same on all ranks and in all sessions. Under
        fsdp no process has the whole model, so only the modules known to overflow (overflow.py) compute in fp32.
        """
        device, packs = distributed.device(), self._packs("train")
        first = packs.batch(torch.arange(min(2, len(packs))))
        batch = {name: values.to(device) for name, values in first.items()}

        def trial() -> None:
            model.to(device)
            with self._as_in_training(device):
                self.logits(model, batch)

        names = overflow.mend(model, None if self.config.strategy == "fsdp" else trial)
        if names and distributed.is_main():
            shown = ", ".join(name.removeprefix("base_model.model.") for name in names[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            print(f"computed in fp32, because their numbers exceed fp16's range: {shown}{more}", flush=True)

    # The loss
    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return logits fp32[B, A, vocabulary] at the positions batch["at"]; without "at", at all T positions."""
        segments, at = batch["segments"], batch.get("at")
        if self.config.packing:
            mask = data.block_mask(segments)
            if model.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
                least = torch.finfo(torch.float32).min
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, least)
            inputs = {"attention_mask": mask, "position_ids": batch["positions"]}
        else:
            inputs = {"attention_mask": (segments > 0).long()}
        if model.config.model_type == "gemma3":  # type: ignore[union-attr]
            inputs["token_type_ids"] = torch.zeros_like(batch["ids"])  # 0 is text; transformers 5.0 requires them
        head = models.head_of(model) if at is not None and model.selects_positions else None
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
        """Return the cross entropy in nats, summed over the tokens of answers, in fp32 (fp16's maximum is 65504)."""
        self._check_packing_once(model, batch)
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")

    def count(self, batch: dict[str, Tensor]) -> int:
        """Return the number of tokens of answers."""
        return int((batch["targets"] != data.IGNORED).sum())

    def _check_packing_once(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        if self.config.packing and "checked" not in self._cache:
            self.check_packing(model, batch["ids"].device)
            self._cache["checked"] = True

    @torch.no_grad()
    def check_packing(self, model: nn.Module, device: torch.device) -> None:
        """Check that the model keeps packed examples apart: two examples in a pack have the same logits as each alone.

        Raises:
            ValueError: the logits differ (recurrent layers, sliding windows that ignore masks, no position_ids).
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
            said = f"the logits differ by {difference:.2g} of their size from the logits of each conversation alone"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # the model does not accept a block mask
            difference, said = math.inf, f"the model accepts no block mask ({type(error).__name__}: {error})"
        finally:
            model.train(training)
            torch.clear_autocast_cache()  # else training would reuse casts of weights made under no_grad
        exact = not torch.is_autocast_enabled(device.type) and self.base_dtype == torch.float32
        if not difference < (1e-3 if exact else 5e-2):
            raise ValueError(
                f"packing=True, but {type(model).__name__} does not keep packed conversations apart: {said}. "
                f"Set packing=False."
            )

    # Evaluation
    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Any, int]]:
        found: dict[str, tuple[Any, int]] = {}
        # ranks generate with different numbers of forward passes, so under fsdp each needs the whole model
        with shards.gathered(model) if "generate" in batch else nullcontext():
            # a rank without a pack in the batch checks too: alone in a later step it would, under fsdp, wait for ever
            self._check_packing_once(model, batch)
            if len(batch["ids"]):
                found["loss"] = (self.loss(model, batch), self.count(batch))
            asked = batch.get("generate")
            if asked is not None and len(asked):
                found |= self._rouge(model, asked.tolist())
        return found

    def _rouge(self, model: nn.Module, numbers: list[int]) -> dict[str, tuple[Any, int]]:
        """Answer the batches `numbers` of `prompt_batches`. Return {name: (sum, count)} of rouge_l and answered."""
        total, answered, wanted = 0.0, 0, 0
        reference = self._cache.setdefault("references", self.examples("val").answers())
        batches = self.prompt_batches()
        for number in numbers:
            wanted += len(batches[number])
            texts = self._answers(model, number)
            answered += len(texts)
            for index, text in zip(batches[number], texts, strict=False):
                total += rouge.rouge_l(text, reference[index])
        found: dict[str, tuple[Any, int]] = {"answered": (float(answered), wanted)}
        return {**found, "rouge_l": (total, answered)} if answered else found

    def _answers(self, model: nn.Module, number: int) -> list[str]:
        """Return the answers to a batch of prompts; [], with a message once, if the model cannot generate."""
        if self.no_generation:
            return []
        distributed.alive()
        val, indices = self.examples("val"), self.prompt_batches()[number]
        stop = generation.stops(self.tokenizer, model, [val[i][0].tolist() for i in indices])
        weights = models.fingerprint(models.trained_weights(model)) + f" {self.prepared.digest} {self.backend}"
        file = Path(self.prepared.folder) / f"answers-{number:03d}.json"
        prompts = [val.prompt(index) for index in indices]
        try:
            return generation.stored_answers(
                file, weights, model, self.tokenizer, prompts, max_new_tokens=self.config.max_new_tokens, stop=stop,
                num_beams=self.config.generation_num_beams,
            )  # fmt: skip
        except Exception as error:
            self.no_generation = f"{type(error).__name__}: {error}"
            print(f"no answers can be generated ({self.no_generation}): evaluating by loss and perplexity", flush=True)
            return []

    def summary(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Return loss (nats per token), perplexity = exp(loss), and rouge_l if all of `prompt_batches` are answered."""
        loss = float(metrics["loss"])
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if "rouge_l" in metrics and float(metrics["answered"]) == 1:
            found["rouge_l"] = float(metrics["rouge_l"])
        return found

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `summary` of the held-out data, computed in this process; {} if nothing is held out."""
        held = self.val_data()
        if held is None:
            return {}
        totals: dict[str, tuple[float, int]] = {}
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        with self._as_in_training(device):
            for start in range(0, len(held), 4):
                batch = held.batch(torch.arange(start, min(start + 4, len(held))))
                for name, (total, count) in self.metrics(model, {k: v.to(device) for k, v in batch.items()}).items():
                    before = totals.get(name, (0.0, 0))
                    totals[name] = (before[0] + float(total), before[1] + count)
        model.train(training)
        return self.summary({name: torch.tensor(total / count) for name, (total, count) in totals.items()})

    def answers(self, model: nn.Module) -> list[tuple[str, str, str]]:
        """Return (question, answer in the data, the model's answer) for each held-out example in `prompt_batches`."""
        val = self.examples("val")
        reference = val.answers()
        found = []
        for number, indices in enumerate(self.prompt_batches()):
            with self._as_in_training(next(model.parameters()).device):
                texts = self._answers(model, number)
            for index, text in zip(indices, texts, strict=False):
                question = str(self.tokenizer.decode(val.prompt(index), skip_special_tokens=True))
                found.append((question, reference[index], text))
        return found

    def _as_in_training(self, device: torch.device) -> torch.autocast:
        """Return autocast with the run's precision."""
        dtype = models.DTYPES[self.precision]
        return torch.autocast(device.type, dtype if dtype != torch.float32 else None, dtype != torch.float32)

    def unigram_loss(self) -> float:
        """Return the held-out loss (nats per token) of a unigram model of the training answers, add-one smoothed."""
        counts, held = (self._counts(part) for part in ("train", "val"))
        p = (counts + 1) / (counts.sum() + len(counts))
        return float(-(held * p.log()).sum() / held.sum())

    def _counts(self, part: str) -> Tensor:
        examples = self.examples(part)
        learnt = torch.from_numpy(examples.array("tokens")[examples.array("learnt")]).long()
        return torch.bincount(learnt, minlength=len(self.tokenizer)).double()

    # Description
    def plan(self) -> tuple[memory.Estimate, list[str]]:
        """Return the estimated memory of a GPU, and the names of the layers with adapters."""
        if "plan" not in self._cache:
            config, packs = self.config, self._packs("train")
            replicas = (len(devices.gpus()) or 1) if config.nproc == "auto" else int(config.nproc)
            if isinstance(config.micro_batch_size, int):
                micro = config.micro_batch_size
            else:
                parts = replicas * (config.gradient_accumulation_steps or 1)
                size = config.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
                micro = max(1, (parse_per_gpu(size) * replicas if isinstance(size, str) else size) // parts)
            lengths = packs.examples.lengths
            longest = max(sum(lengths[i] for i in pack) for pack in packs.packs[:100])
            learnt = self.prepared.train_learnt / max(1, self.prepared.train_tokens)
            self._cache["plan"] = memory.estimate(
                self.prepared.model,
                config,
                base_dtype=self.base_dtype,
                precision=self.precision,
                tokens=micro * longest,
                learnt=int(micro * longest * learnt),
            )
        found: tuple[memory.Estimate, list[str]] = self._cache["plan"]
        return found

    def describe(self) -> str:
        """Describe model, tuning, data, truncated examples, packs and estimated memory in four lines."""
        p, config = self.prepared, self.config
        packs = self._packs("train").packs
        planned, names = self.plan()
        tuned = (
            f"LoRA rank {config.lora_rank} on {', '.join(names)}; base weights in "
            + ("nf4" if config.mode == "qlora" else str(self.base_dtype).removeprefix("torch."))
            if names
            else "all weights"
        )
        full = p.train_tokens / (len(packs) * config.max_length)
        out = f"; {p.truncated} cut at {config.max_length} tokens ({p.truncated_tokens:,} tokens of answers lost)"
        out += f", {p.dropped} dropped, because their answers begin later" if p.dropped else ""
        whole = not isinstance(config.micro_batch_size, int)
        limit = " for the largest possible micro-batch" if whole else f" for {config.micro_batch_size} packs at a time"
        none_held = (
            ": too few conversations have different first messages, so give val_path" if config.val_fraction else ""
        )
        asked = f"; ROUGE-L on {sum(map(len, self.prompt_batches()))} of them" if self.prompt_batches() else ""
        if self.no_generation:
            asked = f"; no answers can be generated ({self.no_generation}): evaluating by loss and perplexity"
        return "\n".join(
            [
                f"model: {p.model}: {planned.parameters:,} parameters, {planned.trainable:,} of them trained "
                f"({self.backend}: {tuned})"
                + ("; no model was given: random weights, for a trial run; use lr=4e-3" * (config.model is None)),
                f"data: {p.source}, {p.kind}: {p.train:,} examples of {p.train_tokens:,} tokens, {p.train_learnt:,} of "
                f"answers{out if p.truncated or p.dropped else '; none cut'}",
                f"template: {p.template}; {len(packs):,} "
                + (f"packs of at most {config.max_length} tokens, {full:.0%} full" if config.packing else "samples")
                + f"; {p.val:,} examples held out{asked if p.val else none_held}",
                f"memory per GPU, estimated{limit}: {planned.sentence()}",
            ]
        )

    def on_record(self, record: dict[str, Any]) -> None:
        """Add rank 0's peak memory to every record."""
        record["peak_memory_mib"] = round(memory.peak_memory() / 2**20)

    # Results
    def untrained(self) -> nn.Module:
        """Return the model before training, in this process; its adapters change nothing yet."""
        torch.manual_seed(self.config.seed)
        return self.model().to(distributed.device()).eval()

    def load(self, result: Result, which: str = "best") -> nn.Module:
        """Return the trained model with its "best" or "final" weights, adapters included, in this process."""
        return result.load(self.model().to(distributed.device()), which)

    def export(self, result: Result, which: str = "best") -> Path:
        """Write output_dir/adapter as peft does, with tokenizer and model card; for full, the card alone.

        Returns the folder that it wrote to.
        """
        return output.export(self, result, which)
