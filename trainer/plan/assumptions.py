"""What a plan of a person's own data takes for granted, in words that are printed with it."""

import re
from collections.abc import Mapping

from trainer.plan.cost import Machine
from trainer.plan.sample import Question, Sampled

_DAY = re.compile(r"day=(\d{4}-\d{2}-\d{2})")


def samples_per_day(question: Question, sampled: Sampled) -> tuple[float, str]:
    """How many, and where that is from."""
    if question.samples_per_day is not None:
        return question.samples_per_day, "as given"
    days = {found.group(1) for group in sampled.index.row_groups if (found := _DAY.search(group.file))}
    total = sampled.index.num_samples
    if not days:
        return total, "all training samples, as their files name no day; --samples-per-day says otherwise"
    return total / len(days), f"the training samples of {len(days)} days, by the names of their files"


def assumptions(
    question: Question, sampled: Sampled, machines: Mapping[int, Machine], fits: bool, reuse_steps: int
) -> list[str]:
    """One line each; `machines` by ranks on one machine, `fits`: the store itself was used to measure."""
    per_machine, speed = question.ranks_per_machine, question.link_bytes_per_s * 8 / 1e9
    per_day, origin = samples_per_day(question, sampled)
    lines = [
        f"Every machine is like this one, with {per_machine} rank{'s' if per_machine > 1 else ''} on it; "
        f"they are joined by a network of {speed:g} Gbit/s each way with {question.latency_s * 1e6:g} us for a message "
        "(--network, --latency-us); nobody else uses it.",
        f"A day of logs is {per_day:,.0f} samples: {origin}.",
        "Features lie in memory (or in the cache of files): see the bytes that a rank holds.",
        "Store in worker: samples carry the features of each group once, come over the same network, cost nothing to "
        "decode but a copy, and E runs once per occurrence. Store in server: a rank's unique features travel a step "
        "ahead. ID vectors, reading and the worker model are those of the exchange in both.",
        "Evaluation, checkpoints and the start of a run are left out.",
    ]
    lines += [
        f"Measured with {local} on a machine: a step of the real loop takes {machine.interference:.2f} times what its "
        f"stages say; steps vary by {machine.rates.jitter:.1%}; a collective costs {machine.network.call_s * 1e3:.2g} "
        f"ms, a rank moves {machine.network.local_bytes_per_s / 1e9:.2g} GB/s."
        for local, machine in machines.items()
    ]
    if reuse_steps:
        lines.append(
            f"exchange.reuse_steps={reuse_steps}: E was measured at one rank, with the share of vectors that it reuses."
        )
    lines += _extrapolated(question, sampled)
    if not fits:
        lines.append(
            "The store is larger than a quarter of this machine's memory: drawn features stood in for it while E "
            "and the gather were measured."
        )
    return lines


def _extrapolated(question: Question, sampled: Sampled) -> list[str]:
    """Which figures go beyond the data, and by what law."""
    lines = []
    largest = max(question.global_size(ranks) for ranks in question.ranks)
    for name, population in (("images", sampled.images), ("ids", sampled.ids)):
        law, drawn = population.curve.beyond, population.curve.points[-1].samples
        if population.curve.is_extrapolated(largest):
            how = f"Zipf's law with exponent {law.exponent:.2g} over {law.keys:,.3g} keys" if law else "Heaps' law"
            error = population.curve.error
            known = f"; fitted to half of them it was {error:.1%} off at all of them" if error is not None else ""
            lines.append(f"Batches above {drawn:,} samples are extrapolated: {name} by {how}{known}.")
    return lines
