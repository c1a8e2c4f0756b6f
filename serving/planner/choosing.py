"""Which models of the catalog suit a rig: the largest that run well on it, newer ones counted for more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from serving.config import CostConfig
from serving.models.catalog import CatalogModel, Use, catalog_models
from serving.planner.options import Option, Wishes, plan
from serving.planner.rig import Rig
from serving.planner.subject import Subject, of_catalog

USES: tuple[Use, ...] = ("chat", "code", "embedding")
# A model as old again as this is worth one of half its size: cautious beside what is published of such growth
# (arXiv 2412.04315 finds 3.5 months).
_MONTHS_OF_HALF_WORTH = 12
_LEAST_CONTEXT = 8192
# Those that lose little, the best first: heavier ones are no way to run a larger model.
_MIXTURES = ("MXFP4_MOE", "Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS")
_GOOD_TOKENS_PER_SECOND = 15.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A model that suits, and how to run it."""

    model: CatalogModel
    option: Option


def choices(rig: Rig, wishes: Wishes, cost: CostConfig, most: int) -> dict[Use, list[Choice]]:
    """The best models for each use, at most so many."""
    wishes = replace(
        wishes,
        users=wishes.users or 1,
        context_tokens=wishes.context_tokens or _LEAST_CONTEXT,
    )
    found: dict[Use, list[Choice]] = {use: [] for use in USES}
    for model in sorted(catalog_models(), key=_worth, reverse=True):
        open_uses = [use for use in model.good_for if len(found[use]) < most]
        option = _option(model, rig, wishes, cost) if open_uses else None
        if option is not None:
            for use in open_uses:
                found[use].append(Choice(model, option))
    return found


def _option(model: CatalogModel, rig: Rig, wishes: Wishes, cost: CostConfig) -> Option | None:
    """How to run a model well; None if it does not. Of the quantizations that lose
    little the best that is all in one place, or else the best."""
    architecture = model.architecture
    longest = min(wishes.context_tokens or _LEAST_CONTEXT, architecture.context_length)
    subject = of_catalog(model)
    if not _may_fit(subject, rig):
        return None
    split = None
    for mixture in _MIXTURES:
        if mixture in subject.mixtures:
            tried = replace(subject, mixtures=(mixture,))
            options = plan(tried, rig, replace(wishes, context_tokens=longest), cost).options
            if options and _runs_well(options[0]):
                if not options[0].is_split:
                    return options[0]
                split = split or options[0]
    return split


def _may_fit(subject: Subject, rig: Rig) -> bool:
    """Whether the weights alone are less than all memory there is, at four bits each at least."""
    least_bytes = subject.architecture.parameters / 2
    there = rig.host.memory_bytes + (
        0 if rig.shares_memory else sum(card.memory_bytes for card in rig.cards)
    )
    return least_bytes < there


def _runs_well(option: Option) -> bool:
    each_user = option.speed.all_users / option.speed.users
    return option.meets_wishes and each_user >= _GOOD_TOKENS_PER_SECOND


def _worth(model: CatalogModel) -> float:
    """A mixture of experts is worth the geometric mean of all and of active parameters, as is common to say."""
    architecture = model.architecture
    size = sqrt(architecture.parameters * architecture.active_parameters)
    years = (_months(model.released) - _months("2025-01")) / _MONTHS_OF_HALF_WORTH
    return size * float(2**years)


def _months(released: str) -> int:
    year, month = released.split("-")
    return 12 * int(year) + int(month)
