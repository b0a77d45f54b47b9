"""Samplers, drafters, verifications, rules and cost models with a fault each, and without."""

from __future__ import annotations

import attrs
import torch

from blt_core import Component, hookimpl
from blt_core.types import FREE_STREAM, Cost, Draft, Round, matches
from blt_plugins.verification.laws import rejection


@attrs.frozen(kw_only=True)
class Params:
    """fault: what is wrong."""

    fault: str = ""


class Sampler:
    """``ar``, but for the fault."""

    def __init__(self, params, context):
        fault = self.fault = params.fault
        self.calls, self.seen = 0, 0
        self.true_logits = fault not in ("cold", "seeded-greedy")
        self.in_law = fault == "unfair"

    def check(self, sampling):
        return False if self.fault == "answers" else None

    def round(self, ops, sampling, draws):
        fault = self.fault
        fresh, rows, begin = ops.fresh, [int(left > 0) for left in ops.remaining], ops.lengths
        if fault.startswith("adapts") and not fresh:
            return self.speculates(ops, sampling, draws)
        if fault == "no-empty" and fresh and min(begin) == 1:
            raise ValueError("an empty prompt")
        if fault == "drafts" and not fresh:
            logits = ops.draft_logits(rows)[:, 0]
        else:
            logits = ops.next_logits(rows)[:, 0]
        if fault == "cold":
            picked = [int(row.argmax()) if on else -1 for row, on in zip(logits, rows)]
        elif fault == "seeded-greedy":
            picked = [
                int(row.topk(2).indices[draws.seeds[b] % 2]) if on else -1
                for b, (row, on) in enumerate(zip(logits, rows))
            ]
        else:
            if fault == "batch":
                logits = logits + 0.5 * logits.nan_to_num(neginf=0.0).mean(0)
            if fault == "global-random":
                logits = logits + 2 * torch.rand_like(logits)
            if fault == "state-on-self" or (fault == "unfair" and not sampling.greedy):
                logits = logits.clone()
                boosted = self.seen % 256 if fault == "state-on-self" else slice(0, 128)
                logits[:, boosted] += 30 if fault == "state-on-self" else 1.0
            stream = 7 if fault == "other-draws" else 0
            picked = sampling.pick(logits, begin, rows, draws, stream)
        self.seen = picked[0] + 1
        ids = [[token] if on else [] for token, on in zip(picked, rows, strict=True)]
        if fault == "rewrites" and not fresh:
            ops.rewind([n - 1 for n in begin])
            ops.append([[90, *new] for new in ids])
            return Round(ids, [0] * len(rows), [0] * len(rows))
        if fault == "commits-nothing":
            ids = [[] for _ in ids]
        ops.append(ids)
        if fault == "tells-other-ids":
            ids = [[(token + 1) % 256 for token in row] for row in ids]
        drafted, accepted = [0] * len(rows), [0] * len(rows)
        if fault == "accepts-more":
            accepted = [1] * len(rows)
        if fault == "fractions":
            drafted = accepted = [0.5] * len(rows)
        prefill = fresh or fault == "always-prefill"
        return Round(ids, drafted, accepted, prefill=prefill)

    def speculates(self, ops, sampling, draws):
        """A round with drafts whose length follows what it has done for other requests."""
        begin, active = ops.lengths, [left > 0 for left in ops.remaining]
        self.calls += 1
        size = {"adapts": 1 + self.calls % 3, "adapts-to-batch": len(begin)}[self.fault]
        limit = [min(size, max(left - 1, 0)) for left in ops.remaining]
        ids = [[] for _ in limit]
        while any(len(row) < most for row, most in zip(ids, limit)):
            going = [int(len(row) < most) for row, most in zip(ids, limit)]
            picked = sampling.pick(ops.draft_logits(going)[:, 0], ops.lengths, going, draws)
            ops.append([[token] if on else [] for token, on in zip(picked, going)])
            for row, (token, on) in enumerate(zip(picked, going)):
                ids[row] += [token] if on else []
        ops.rewind(begin)
        ops.append(ids)
        rows = [len(row) + 1 if on else 0 for row, on in zip(ids, active)]
        own = sampling.picks(ops.next_logits(rows), begin, rows, draws)
        accepted = [matches(row, each) for row, each in zip(ids, own)]
        ops.rewind([n + kept for n, kept in zip(begin, accepted)])
        ops.append([[row[kept]] if row else [] for row, kept in zip(own, accepted)])
        committed = [row[: kept + 1] for row, kept in zip(own, accepted)]
        return Round(committed, [len(row) for row in ids], accepted)


class Drafter:
    """The decoder's own next bytes, one pass each."""

    def __init__(self, params, context):
        self.fault, self.calls, self.last = params.fault, 0, 0

    def draft(self, ops, limit, sampling, draws, rule=None):
        fault = self.fault
        self.calls += 1
        if fault == "none":
            return None
        size = ops.scheme.size
        ids = [[] for _ in limit]
        probs = []
        begin = ops.lengths
        going = [min(most, 3) > 0 for most in limit]
        if fault == "cuts-text":
            ops.rewind([n - 1 for n in begin])
            ops.append([[90] for _ in begin])
        shift = self.last % 5 if fault == "state-on-self" else 0
        if fault == "batch":
            shift = len(ids)
        if fault == "global-random":
            shift = int(torch.randint(0, 50, ()))
        while any(going):
            logits = ops.draft_logits([int(on) for on in going])[:, 0]
            beliefs = sampling.belief(logits)
            for row, on in enumerate(going):
                if on and rule is not None and fault != "deaf":
                    kept, _ = rule(row, beliefs[row : row + 1])
                    if fault == "asks-on":
                        rule(row, beliefs[row : row + 1])
                    if not kept:
                        going[row] = False
            picked = sampling.pick(logits, ops.lengths, going, draws)
            q = sampling.probabilities(logits)
            if fault == "wrong-q":
                q = torch.ones_like(q) / size
            if fault == "thin-q":
                q = q * 0.5
            probs.append(q)
            new = [
                [(t + shift) % 256 if shift else t] if on else [] for t, on in zip(picked, going)
            ]
            ops.append(new)
            for row, each in enumerate(new):
                ids[row] += each
            going = [
                on and len(row) < min(most, 3) and ops.scheme.eos not in row
                for on, row, most in zip(going, ids, limit)
            ]
            if rule is not None and fault != "deaf":
                going = (
                    [False] * len(going) if all(len(r) for r, m in zip(ids, limit) if m) else going
                )
        self.last = ids[0][-1] if ids[0] else self.last
        if fault == "too-long":
            ids = [[*row, 97] for row in ids]
        if fault == "strange-id":
            ids = [[300] if row else [] for row in ids]
        wants_q = draws.begins is not None and probs
        return Draft(ids, torch.stack(probs, 1) if wants_q else None)


class Verification:
    """``replay``, but for the fault."""

    def __init__(self, params, context):
        self.fault, self.calls = params.fault, 0
        if params.fault == "unfair":
            self.draws_of_round = True
        if params.fault in ("lawless", "other-law"):
            self.law = self.accepts_as_likely

    def accepts_as_likely(self, ids, q_kV, p_jV):
        law = rejection(ids, q_kV, p_jV)
        following = p_jV if self.fault == "lawless" else law.next_jV
        return law._replace(next_jV=following)

    def check(self, sampling):
        return True if self.fault == "answers" else None

    def accept(self, draft, logits_brV, positions, active, sampling, draws):
        fault = self.fault
        self.calls += 1
        rows = [len(ids) + 1 if on else 0 for ids, on in zip(draft.ids, active, strict=True)]
        if fault == "first-position":
            positions = [positions[0]] * len(rows)
        if fault == "global-random":
            logits_brV = logits_brV + torch.rand_like(logits_brV)
        if fault == "state-on-self":
            logits_brV = logits_brV.clone()
            logits_brV[..., self.calls % logits_brV.shape[-1]] += 20
        chosen = sampling.picks(logits_brV, positions, rows, draws)
        accepted = [matches(ids, own) for ids, own in zip(draft.ids, chosen, strict=True)]
        if fault == "accepts-all" or (fault == "unfair" and not sampling.greedy):
            accepted = [len(ids) if on else 0 for ids, on in zip(draft.ids, active)]
        own = [ids[kept] if ids else -1 for ids, kept in zip(chosen, accepted, strict=True)]
        if fault == "beyond":
            accepted = [n + 1 for n in accepted]
        if fault == "idle-rows":
            own = [max(token, 0) for token in own]
        if fault == "none":
            return None
        return accepted, own


class Unmasking:
    """The likeliest masked byte of each row."""

    def __init__(self, params, context):
        self.fault, self.calls = params.fault, 0

    def select(self, probs_bBV, masked_bB, starts, draws):
        fault = self.fault
        self.calls += 1
        best = probs_bBV.amax(-1).masked_fill(~masked_bB, -1.0)
        if fault == "global-random":
            best = torch.rand(best.shape).masked_fill(~masked_bB, -1.0)
        if fault == "state-on-self" and self.calls % 2:
            best = (2.0 - best).masked_fill(~masked_bB, -1.0)
        if fault == "across-rows":
            best = (best + best.mean(0).flip(0)).masked_fill(~masked_bB, -1.0)
        if fault in ("draws-at-place", "draws-for-ar", "draws-right"):
            stream = 0 if fault == "draws-for-ar" else FREE_STREAM + 1
            for row, start in enumerate(starts):
                begin = 0 if fault == "draws-at-place" else start
                drawn = [draws.uniform(row, begin + i, stream) for i in range(best.shape[1])]
                best[row] = torch.tensor(drawn).masked_fill(~masked_bB[row], -1.0)
        chosen = torch.zeros_like(masked_bB)
        chosen[torch.arange(len(best)), best.argmax(-1)] = True
        if fault == "writes":
            probs_bBV.zero_()
        if fault == "nothing":
            return chosen & False
        if fault == "integers":
            return best.argmax(-1)
        if fault == "one-row":
            return chosen[0]
        if fault == "floats":
            return chosen.float()
        return chosen


class CostModel:
    """Decoder passes by its size."""

    def __init__(self, params, context):
        self.fault, self.calls, self.sizes = params.fault, 0, None

    def cost(self, passes, parameters):
        fault = self.fault
        self.calls += 1
        self.sizes = self.sizes or parameters
        if fault == "first-sizes":
            parameters = self.sizes
        line = 2e-9 * passes.decoder * parameters.decoder
        if fault == "negative":
            line = -1.0
        if fault == "nan":
            line = float("nan")
        if fault == "tensor":
            line = torch.tensor(line)
        if fault == "text":
            line = "much"
        if fault == "bare":
            return line
        if fault == "less-for-more":
            line = 1.0 / (1 + passes.decoder)
        if fault == "counts-calls":
            line = line + self.calls
        total = line + 1.0 if fault == "odd-total" else line
        unit = "GB"
        if fault == "no-unit":
            unit = ""
        if fault == "two-units" and line > 1:
            return Cost(1000 * total, {"decoder": 1000 * line}, unit="MB")
        return Cost(total, {"decoder": line}, unit=unit)


FAULTS = {
    "sampler": {
        "answers": "check",
        "no-empty": "runs",
        "commits-nothing": "commits",
        "tells-other-ids": "commits",
        "accepts-more": "counts",
        "fractions": "counts",
        "always-prefill": "counts",
        "rewrites": "keeps-text",
        "global-random": "deterministic",
        "batch": "batch",
        "adapts-to-batch": "batch",
        "state-on-self": "stateless",
        "adapts": "stateless",
        "cold": "temperature",
        "seeded-greedy": "temperature",
        "drafts": "true-logits",
        "other-draws": "identical",
        "unfair": "law",
    },
    "drafter": {
        "none": "proposes",
        "strange-id": "proposes",
        "too-long": "limit",
        "cuts-text": "keeps-text",
        "global-random": "deterministic",
        "batch": "batch",
        "state-on-self": "stateless",
        "deaf": "stops",
        "asks-on": "stops",
        "thin-q": "probabilities",
        "wrong-q": "law",
    },
    "verification": {
        "answers": "check",
        "none": "decides",
        "beyond": "decides",
        "idle-rows": "decides",
        "global-random": "deterministic",
        "first-position": "batch",
        "state-on-self": "stateless",
        "accepts-all": "identical",
        "unfair": "law",
        "lawless": "exact",
        "other-law": "follows",
    },
    "unmasking": {
        "nothing": "places",
        "integers": "places",
        "one-row": "places",
        "floats": "places",
        "writes": "arguments",
        "global-random": "deterministic",
        "across-rows": "batch",
        "state-on-self": "stateless",
        "draws-at-place": "draws",
        "draws-for-ar": "draws",
        "says-in-order": "in-order",
    },
    "cost_model": {
        "negative": "finite",
        "nan": "finite",
        "tensor": "finite",
        "text": "finite",
        "bare": "finite",
        "odd-total": "lines",
        "no-unit": "unit",
        "two-units": "unit",
        "less-for-more": "monotone",
        "counts-calls": "stateless",
        "first-sizes": "stateless",
    },
}


@hookimpl
def blt_components():
    def of(kind, factory, provides=lambda _: frozenset()):
        return Component(
            kind, "broken/it", factory, Params, f"{kind} with a fault", provides=provides
        )

    return [
        of("sampler", Sampler),
        of("drafter", Drafter, lambda _: frozenset({"stops_early", "gives_q"})),
        of("verification", Verification),
        of(
            "unmasking",
            Unmasking,
            lambda p: frozenset({"in_order"} if p.fault == "says-in-order" else ()),
        ),
        of("cost_model", CostModel),
    ]
