"""A DPO step, one row for each pair against the naive way, side by side in one run: `python tests/bench/bench_dpo.py --help`.

Naive: chosen and rejected as two whole padded sequences, each with the picture and the prompt, and logits for every position.
Both sides have the tower's features and the reference's log-probs at hand, train the same LoRA, and give the same loss.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minialign.config import parse_config  # noqa: E402
from minialign.logprobs import response_logps  # noqa: E402
from minialign.lora import Policy  # noqa: E402
from minialign.losses import dpo, margin  # noqa: E402
from minialign.mllm import MLLM, Features  # noqa: E402
from minialign.rows import Row, hidden_states, pack  # noqa: E402

IMAGE = 3


def make_model(options):
    """A random LLaVA of the asked shape."""
    config = parse_config({
        "model_type": "llava", "image_token_index": IMAGE,
        "text_config": {"model_type": "llama", "vocab_size": options.vocab, "hidden_size": options.width, "intermediate_size": options.width * 11 // 4,
                        "num_hidden_layers": options.layers, "num_attention_heads": options.width // 64, "max_position_embeddings": 8192},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "image_size": 14 * int(options.vectors**.5), "patch_size": 14}}, "bench")
    torch.manual_seed(0)
    with torch.device(options.device):
        model = MLLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=.02) if parameter.ndim > 1 else None
    return model.to(getattr(torch, options.dtype))


def naive(model, pairs):
    """Summed log-probs (B, 2), each response behind a whole prompt of its own, log-softmax over all positions."""
    rows = [Row.of(prompt, pictures, [response]) for prompt, pictures, responses in pairs for response in responses]
    batch = pack(model, rows)
    logps = torch.log_softmax((hidden_states(model, batch) @ model.head.T).float(), -1)  # (2B, T, V)
    picked = logps.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (batch.targets != -100)).sum(1).view(-1, 2)


def one_row(model, pairs):
    return response_logps(model, [Row.of(prompt, pictures, responses) for prompt, pictures, responses in pairs])[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in (("width", 256), ("layers", 4), ("vocab", 32000), ("vectors", 576), ("prompt", 30), ("response", 80), ("pairs", 4), ("rank", 16), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = make_model(options)
    policy = Policy(model, options.rank, 2 * options.rank)
    generator, pairs = torch.Generator().manual_seed(0), []

    def ids(n):
        return torch.randint(4, options.vocab, (n,), generator=generator).tolist()

    for _ in range(options.pairs):
        features = Features(torch.randn(1, int(options.vectors**.5)**2, 64, generator=generator).to(model.head), (1, 1))
        pairs.append(([1, IMAGE, *ids(options.prompt)], [features], [ids(options.response), ids(options.response)]))
    with torch.no_grad():
        reference = one_row(model, pairs)
    seconds, losses = {"naive": [], "one row": []}, {}
    for _ in range(options.repeats + 1):  # the first round warms up
        for name, method in (("naive", naive), ("one row", one_row)):
            began = time.perf_counter()
            loss = dpo(margin(method(model, pairs), reference), .1).mean()
            loss.backward()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
            losses[name] = float(loss.detach())
            for parameter in policy.parameters().values():
                parameter.grad = None
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"naive {1000 * medians['naive']:.0f} ms, one row {1000 * medians['one row']:.0f} ms a step of {options.pairs} pairs: "
          f"{medians['naive'] / medians['one row']:.2f} times as fast, losses {losses['naive']:.6f} and {losses['one row']:.6f}")


if __name__ == "__main__":
    main()
