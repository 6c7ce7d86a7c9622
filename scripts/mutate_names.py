#!/usr/bin/env python3
"""Rename solved model pairs in a hundred ways and see that no renaming makes the plan wrong.

    python scripts/mutate_names.py CASES [--count 5000] [--seed 0] [--kinds both-0.7,missing] [--no-words] [-v]

CASES: a folder of cases, each with torch.safetensors, like.safetensors and truth.safetensors. A mutation renames leaves
of one side or both, removes, adds or stacks tensors; the truth moves with it. Verdicts: exact; refused (a question or a
missing leaf); WRONG (complete, and a leaf differs), which must never happen. Exit status 1 if anything is WRONG.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from graftax.match import infer
from graftax.match.names import Lexicon
from graftax.ops import apply_chain, same_bits
from graftax.plans import Proposal
from graftax.tree import Checkpoint, TensorSpec

Arrays = dict[str, np.ndarray[Any, Any]]

# Parts of names that mean the same in the field. A renaming takes another word of the row for the whole side.
WORDS: tuple[tuple[str, ...], ...] = (
    ("q", "query", "wq", "q_proj", "query_proj", "to_q", "q_lin", "queries"),
    ("k", "key", "wk", "k_proj", "key_proj", "to_k", "k_lin", "keys"),
    ("v", "value", "wv", "v_proj", "value_proj", "to_v", "v_lin", "values"),
    ("o", "out", "wo", "o_proj", "out_proj", "to_out", "out_lin", "proj"),
    ("fc1", "up", "wi", "up_proj", "linear1", "lin1", "dense1", "w_in", "fc_in", "c_fc", "intermediate"),
    ("fc2", "down", "wo", "down_proj", "linear2", "lin2", "dense2", "w_out", "fc_out", "output"),
    ("gate_proj", "gate", "wg", "w_gate", "gate_fc"),
    ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "token_embedding", "token_embed", "tok_emb"),
    ("position_embeddings", "wpe", "pos_embed", "embed_positions", "position_embedding", "pos_emb"),
    ("token_type_embeddings", "segment_embeddings", "type_embeddings", "seg_embed"),
    ("self_attn", "self_attention", "SelfAttention", "attn_self"),
    ("encoder_attn", "cross_attn", "cross_attention", "EncDecAttention", "CrossAttention"),
    ("attn", "attention", "mha", "Attention"),
    ("mlp", "ffn", "feed_forward", "ff", "MLP", "FeedForward"),
    ("layers", "blocks", "h", "layer", "block", "blk"),
    ("layer_norm", "ln", "norm", "layernorm", "LayerNorm"),
    ("norm1", "ln_1", "ln1", "layer_norm1", "layernorm_before", "norm_1", "pre_norm"),
    ("norm2", "ln_2", "ln2", "layer_norm2", "layernorm_after", "norm_2"),
    ("input_layernorm", "attn_norm", "attention_norm", "pre_attention_norm", "ln_attn"),
    ("post_attention_layernorm", "mlp_norm", "ffn_norm", "pre_mlp_norm", "ln_mlp"),
    ("final_layer_norm", "ln_f", "final_norm", "norm_f", "last_norm"),
    ("self_attn_layer_norm", "norm_self_attn", "self_attn_norm", "self_attention_norm"),
    ("encoder_attn_layer_norm", "norm_cross_attn", "cross_attn_norm", "cross_attention_norm"),
    ("lm_head", "head", "logits", "output_head"),
    ("classifier", "head", "fc", "classification_head"),
    ("patch_embed", "patch_embeddings", "patch_embedding", "patchify"),
    ("cls_token", "class_token", "cls"),
    ("encoder", "enc"),
    ("decoder", "dec"),
    ("conv", "convolution", "Conv"),
    ("normalization", "bn", "norm", "batch_norm"),
    ("downsample", "shortcut", "skip", "residual_proj"),
    ("embeddings", "embed", "embedder", "embedding"),
    ("pooler", "pool", "pooling"),
    ("vision_model", "visual", "image_encoder", "vision"),
    ("text_model", "text", "text_encoder", "language"),
)


@dataclass(slots=True)
class Case:
    """One pair: the source's arrays, and like's arrays as they must come out (what no source fills is not in it)."""

    name: str
    torch: Arrays
    flax: Arrays
    assumed: bool = False
    asks: bool = False
    trail: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- judging


def checkpoint(label: str, arrays: Arrays, side: str, values: bool) -> Checkpoint:
    specs = {name: TensorSpec(array.shape, str(array.dtype)) for name, array in arrays.items()}
    return Checkpoint(label, side, specs, arrays.__getitem__ if values else None)  # type: ignore[arg-type]


def solve(case: Case, lex: Lexicon | None = None, settled: Proposal | None = None) -> Proposal:
    source = checkpoint("source", case.torch, "torch", True)
    like = checkpoint("like", case.flax, "flax", False)
    return infer(source, like, "torch", "flax", settled or Proposal(), lex)


def judge(case: Case, proposal: Proposal) -> tuple[str, list[str]]:
    """(exact, refused or WRONG; the leaves that differ)."""
    filled: set[str] = set()
    wrong: list[str] = []
    for entry in proposal.entries:
        found = apply_chain(entry.ops, tuple(case.torch[name] for name in entry.sources))
        for name, array in zip(entry.targets, found, strict=True):
            filled.add(name)
            if not same_bits(array, case.flax[name]):
                wrong.append(f"{entry.sources} -> {name}: {entry.evidence}")
    open_ = proposal.questions or len(filled) != len(case.flax)
    if wrong:
        return ("wrong leaf" if open_ else "WRONG"), wrong
    return ("refused" if open_ else "exact"), []


# ---------------------------------------------------------------- renaming


def renamed(arrays: Arrays, rename: Callable[[list[str]], list[str]], separator: str) -> Arrays | None:
    """The same tensors under other names; None where two names meet."""
    out: Arrays = {}
    for name, array in arrays.items():
        new = separator.join(rename(name.split(separator)))
        if new in out:
            return None
        out[new] = array
    return out


def stems(arrays: Arrays, separator: str) -> list[str]:
    """Every path part but the last, without its numbers."""
    found: dict[str, None] = {}
    for name in arrays:
        for part in name.split(separator)[:-1]:
            if not part.isdigit():
                found[part] = None
    return list(found)


def synonyms(arrays: Arrays, separator: str, p: float, rng: random.Random) -> Arrays | None:
    """Each part that the table knows gets another word with probability p, one word for the whole side."""
    table: dict[str, str] = {}
    new: dict[str, str] = {}  # a stem gets one word, whatever number it bears
    for part in stems(arrays, separator):
        match = re.fullmatch(r"(.*?)(_?\d+)?", part)
        assert match
        for candidate, tail in ((part, ""), (match[1], match[2] or "")):
            rows = [row for row in WORDS if candidate in row]
            if rows and candidate not in new:
                new[candidate] = rng.choice(rng.choice(rows)) if rng.random() < p else candidate
            if rows:
                if new[candidate] != candidate:
                    table[part] = new[candidate] + tail
                break
    if len(set(table.values())) != len(table):
        return None
    return renamed(arrays, lambda parts: [table.get(part, part) for part in parts[:-1]] + parts[-1:], separator)


def anonymous(arrays: Arrays, separator: str, p: float, rng: random.Random) -> Arrays | None:
    """Some parts lose their meaning; the two sides do not use the same letters."""
    letters = [f"{a}{b}" for a in ("xyz" if separator == "." else "mnp") for b in "jrtuwcsd"]
    rng.shuffle(letters)
    table: dict[str, str] = {}
    for part in stems(arrays, separator):
        stem = part.rstrip("0123456789_")
        if stem not in table and stem not in ("params", "batch_stats", "batch"):
            table[stem] = letters.pop() if rng.random() < p and letters else stem

    def hide(part: str) -> str:
        stem = part.rstrip("0123456789_")
        return table.get(stem, stem) + part[len(stem) :]

    return renamed(arrays, lambda parts: [hide(part) for part in parts[:-1]] + parts[-1:], separator)


def offset(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Every whole-part number of one depth counts from another start."""
    by = rng.randint(1, 3)
    return renamed(arrays, lambda parts: [str(int(p) + by) if p.isdigit() else p for p in parts], separator)


def nested(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """A level put around everything (behind the collection), or the first level that all share taken off."""
    word = rng.choice(("model", "net", "backbone", "trunk", "wrapped", "m"))

    def around(parts: list[str]) -> list[str]:
        keep = 1 if separator == "/" and parts[0] in ("params", "batch_stats") else 0
        return [*parts[:keep], word, *parts[keep:]]

    return renamed(arrays, around, separator)


def styled(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Another way of writing: numbers fused to words, or CamelCase words."""
    camel = rng.random() < 0.5

    def write(parts: list[str]) -> list[str]:
        out: list[str] = []
        for i, part in enumerate(parts[:-1]):
            if part in ("params", "batch_stats"):
                out.append(part)
            elif part.isdigit() and i and out and out[-1] not in ("params", "batch_stats") and not camel:
                out[-1] += f"_{part}"
            else:
                out.append("".join(w[:1].upper() + w[1:] for w in part.split("_")) if camel else part)
        return [*out, parts[-1]]

    return renamed(arrays, write, separator)


def merged(arrays: Arrays, separator: str, rng: random.Random) -> Arrays | None:
    """Nested numbers counted through: stages.1.layers.0 -> layers.4."""
    pattern = re.compile(
        r"(\d+)"
        + re.escape(separator)
        + r"([A-Za-z_]*?)"
        + f"{re.escape(separator)}?"
        + r"(\d+)"
        + re.escape(separator)
    )
    seen = sorted({(int(m[1]), int(m[3])) for name in arrays if (m := pattern.search(name))})
    if len(seen) < 3:
        return None
    rank = {pair: i for i, pair in enumerate(seen)}
    out: Arrays = {}
    for name, array in arrays.items():
        match = pattern.search(name)
        new = name
        if match:
            number = rank[(int(match[1]), int(match[3]))]
            new = f"{name[: match.start()]}{number}{separator}{name[match.end() :]}"
        if new in out:
            return None
        out[new] = array
    return out


# ---------------------------------------------------------------- kinds of mutation


def _rename(case: Case, sides: str, change: Callable[[Arrays, str], Arrays | None]) -> Case | None:
    torch = change(case.torch, ".") if "t" in sides else case.torch
    flax = change(case.flax, "/") if "f" in sides else case.flax
    if torch is None or flax is None:
        return None
    return replace(case, torch=torch, flax=flax)


def _missing(case: Case, rng: random.Random) -> Case | None:
    """A true tensor is gone, and an unrelated one of its shape is there."""
    name = rng.choice([n for n in case.torch if case.torch[n].ndim])
    torch = {n: a for n, a in case.torch.items() if n != name}
    stray = rng.choice(("adapter.weight", "ema_scratch", "probe.proj.weight", name.rpartition(".")[0] + ".lora_aux"))
    if stray in torch:
        return None
    torch[stray] = np.random.default_rng(rng.randint(0, 9**9)).standard_normal(case.torch[name].shape).astype("f4")
    return replace(case, torch=torch, asks=True)


def _extra(case: Case, rng: random.Random) -> Case | None:
    """Copies of shapes that go nowhere, under names of their own."""
    torch = dict(case.torch)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([n for n in case.torch if case.torch[n].ndim])
        new = rng.choice(("aux_head.", "ema.", "teacher.", "momentum_encoder.")) + name
        values = np.random.default_rng(rng.randint(0, 9**9)).standard_normal(case.torch[name].shape)
        torch[new] = values.astype(case.torch[name].dtype)
    return replace(case, torch=torch)


def _stacked(case: Case, rng: random.Random, axis: int) -> Case | None:
    """The Flax side keeps its repeated layers in one leaf each, on `axis`."""
    pattern = re.compile(r"/(layers?|blocks?|h|block)(?:/|_)(\d+)/")
    groups: defaultdict[str, dict[int, np.ndarray[Any, Any]]] = defaultdict(dict)
    out: Arrays = {}
    for name, array in case.flax.items():
        match = pattern.search(name)
        if match is None:
            out[name] = array
        else:
            groups[f"{name[: match.start()]}/{match[1]}/{name[match.end() :]}"][int(match[2])] = array
    if not groups or len({len(g) for g in groups.values()}) != 1 or len(next(iter(groups.values()))) < 2:
        return None
    for name, members in groups.items():
        if len({a.shape for a in members.values()}) != 1 or any(a.ndim < axis for a in members.values()):
            return None
        out[name] = np.stack([members[i] for i in sorted(members)], axis)
    return replace(case, flax=out)


def _shuffled_auto(case: Case, rng: random.Random, shuffle: bool) -> Case | None:
    """The Flax side names its modules by a counter per kind, in the order of torch's names or in another order."""
    groups: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    leaf = {"kernel": "Dense", "scale": "LayerNorm", "embedding": "Embed"}
    for name in case.flax:
        parts = name.split("/")
        if parts[-1] in leaf and parts[0] == "params" and len(parts) > 2 and not parts[-2].isdigit():
            word = leaf[parts[-1]]
            word = "Conv" if word == "Dense" and case.flax[name].ndim > 2 else word
            groups[("/".join(parts[1:-2]), word)][parts[-2]] = None
    table: dict[str, str] = {}
    order = {name: i for i, name in enumerate(case.torch)}
    turns: dict[str, float] = {}
    for (parent, word), names in groups.items():
        members = sorted(names, key=lambda n: min((order[t] for t in order if t.split(".")[-2:-1] == [n]), default=0))
        if shuffle:
            # One class, one order of calls: the same in every instance of a block.
            mark = re.sub(r"\d+", "", parent) + word
            members.sort(key=lambda n: turns.setdefault(mark + n, rng.random()))
        for i, member in enumerate(members):
            table[f"{parent}/{member}" if parent else member] = f"{word}_{i}"
    out: Arrays = {}
    for name, array in case.flax.items():
        parts = name.split("/")
        key = "/".join(parts[1:-1])
        if key in table:
            parts[-2] = table[key]
        new = "/".join(parts)
        if new in out:
            return None
        out[new] = array
    return replace(case, flax=out, assumed=True)


KINDS: dict[str, Callable[[Case, random.Random], Case | None]] = {}
for _p in (0.3, 0.7, 1.0):
    KINDS[f"torch-{_p:g}"] = lambda c, r, p=_p: _rename(c, "t", lambda a, s: synonyms(a, s, p, r))
    KINDS[f"flax-{_p:g}"] = lambda c, r, p=_p: _rename(c, "f", lambda a, s: synonyms(a, s, p, r))
    KINDS[f"both-{_p:g}"] = lambda c, r, p=_p: _rename(c, "tf", lambda a, s: synonyms(a, s, p, r))
KINDS |= {
    "anonymous-torch": lambda c, r: _rename(c, "t", lambda a, s: anonymous(a, s, r.choice((0.2, 0.5)), r)),
    "anonymous-flax": lambda c, r: _rename(c, "f", lambda a, s: anonymous(a, s, r.choice((0.2, 0.5, 1.0)), r)),
    "anonymous-both": lambda c, r: _rename(c, "tf", lambda a, s: anonymous(a, s, r.choice((0.2, 0.5, 1.0)), r)),
    "offset": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: offset(a, s, r)),
    "nested": lambda c, r: _rename(c, r.choice(("t", "f", "tf")), lambda a, s: nested(a, s, r)),
    "styled": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: styled(a, s, r)),
    "merged": lambda c, r: _rename(c, r.choice(("t", "f")), lambda a, s: merged(a, s, r)),
    "missing": _missing,
    "missing-renamed": lambda c, r: _after(c, r, _missing, "both-0.7"),
    "extra": _extra,
    "extra-renamed": lambda c, r: _after(c, r, _extra, "flax-0.7"),
    "stack-0": lambda c, r: _stacked(c, r, 0),
    "stack-1": lambda c, r: _stacked(c, r, 1),
    "stack-renamed": lambda c, r: _after(c, r, lambda d, q: _stacked(d, q, q.choice((0, 1))), "torch-0.7"),
    "auto-named": lambda c, r: _shuffled_auto(c, r, False),
    "auto-named-other-order": lambda c, r: _shuffled_auto(c, r, True),
    "mixed": lambda c, r: _after(c, r, KINDS["styled"], "offset", "both-0.3", "nested"),
}


def _after(
    case: Case, rng: random.Random, first: Callable[[Case, random.Random], Case | None], *kinds: str
) -> Case | None:
    found = first(case, rng)
    for kind in kinds:
        if found is None:
            return None
        found = KINDS[kind](found, rng)
    return found


# ---------------------------------------------------------------- running


def load_cases(folder: Path) -> list[Case]:
    """Every case that is solved as it stands: what the source fills is the truth."""
    from graftax.formats import open_path

    out: list[Case] = []
    for path in sorted(p for p in folder.iterdir() if (p / "truth.safetensors").exists()):
        ends = {}
        for name in ("torch", "truth"):
            found = open_path(str(path / f"{name}.safetensors"))
            ends[name] = {key: found.read(key) for key in found}
        out.append(Case(path.name, ends["torch"], ends["truth"]))
    return out


def mutations(cases: list[Case], kinds: list[str], count: int, seed: int) -> Iterator[tuple[str, Case]]:
    """`count` mutations of the cases, the kinds in turn; those that do not apply are drawn again."""
    rng = random.Random(seed)
    made = tried = 0
    while made < count and tried < 20 * count:
        kind = kinds[tried % len(kinds)]
        tried += 1
        found = KINDS[kind](rng.choice(cases), rng)
        if found is not None:
            made += 1
            yield kind, found


def run(
    cases: list[Case], kinds: list[str], count: int, seed: int, lex: Lexicon | None, verbose: bool
) -> Mapping[str, Counter[str]]:
    """kind -> verdicts; prints what is WRONG."""
    table: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for kind, case in mutations(cases, kinds, count, seed):
        proposal = solve(case, lex)
        verdict, wrong = judge(case, proposal)
        if (
            verdict in ("WRONG", "wrong leaf")
            and any("call order" in a.text for a in proposal.assumptions)
            and case.assumed
        ):
            verdict = "wrong under a stated call order"
        table[kind][verdict] += 1
        table[kind]["questions"] += len(proposal.questions)
        if verdict in ("WRONG", "wrong leaf") and (verbose or verdict == "WRONG"):
            print(f"{verdict}: {kind} of {case.name}: {len(wrong)} leaves: {wrong[0]}")
            if verbose:
                print(*wrong[1:6], sep="\n")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--only", default="", help="cases whose name matches")
    parser.add_argument("--no-words", action="store_true", help="with the synonym table emptied")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    cases = [case for case in load_cases(args.cases) if re.search(args.only, case.name)]
    kinds = [k for k in KINDS if not args.kinds or re.search(args.kinds, k)]
    table = run(cases, kinds, args.count, args.seed, Lexicon.empty() if args.no_words else None, args.verbose)
    total: Counter[str] = Counter()
    for kind, row in table.items():
        done = sum(n for v, n in row.items() if v != "questions")
        shown = ", ".join(f"{v} {n}" for v, n in sorted(row.items()))
        print(f"{kind:24} {100 * row['exact'] / done:5.1f} % exact of {done}: {shown}")
        total.update(row)
    print(dict(total))
    return 1 if total["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
