# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How fast, and at what cost?
#
# A walk through one finished storage: what the bound is, what it costs in quality, which
# parameters matter, which methods helped, how sure all of that is, where the time went, and what
# the next budget would buy. It only reads. Set `ACCELSEARCH_STORAGE` to read another database.

# %%
import os
from pathlib import Path

import plotly.io

from accelsearch import figures
from accelsearch.budget import Verdict
from accelsearch.judging import judge
from accelsearch.queries import fastest_feasible, is_unconfirmed, outcomes
from accelsearch.report import findings
from accelsearch.storage import open_storage, read_studies

# The repository's own storage, wherever the notebook is run from.
root = Path.cwd() if Path("storage").is_dir() else Path.cwd().parent
default = f"sqlite:///{root / 'storage' / 'accelsearch.db'}"
storage = open_storage(os.environ.get("ACCELSEARCH_STORAGE", default), create=False)
studies = read_studies(storage)
plotly.io.renderers.default = "plotly_mimetype+notebook"
for place, study in enumerate(studies):
    print(place, findings.name_of(study.configuration), "on", study.environment.device)

# %% [markdown]
# Choose one of them. All that follows is about it.

# %%
study = studies[0]
configuration, budget = study.configuration, study.configuration.budgets[0]
best = fastest_feasible(study)
for outcome, count in outcomes(study).items():
    print(f"{count:4} {outcome.value}")

# %% [markdown]
# ## What is the bound?
#
# The fastest measured setting that keeps every budget. It is a measured speedup, of pairs of calls
# made next to each other, so that drift of the clock cancels.

# %%
print(findings.summary([study]))
if best is not None:
    print(figures.settings_told(best.params))

# %% [markdown]
# ## What does it cost in quality?
#
# Each point is a setting. Up is faster, and left loses less. The dashed line is the budget.

# %%
figures.speedup_against_loss(study).show()

# %% [markdown]
# A mean hides single images. These prompts lose most at the bound:

# %%
if best is not None:
    for row in findings.prompt_losses(study, best)[:5]:
        print(row.prompt, "|", ", ".join(row.losses))

# %% [markdown]
# ## Is it better than just fewer steps?
#
# The plainest way to be faster. Where a study of fewer steps is stored beside this one, its
# baseline is the measured answer; otherwise there is an estimate, which says so.

# %%
fewer = findings.fewer_steps(study, studies)
for told in findings.fewer_steps_told(study, fewer):
    print(told)

# %% [markdown]
# ## Which parameters matter?

# %%
figures.parameter_effects(study).show()

# %%
importances = figures.importances(study)
if isinstance(importances, str):
    print(importances)
else:
    figures.parameter_importances(study).show()

# %% [markdown]
# ## Which methods helped?
#
# Settings that differ in one method alone tell what it did, on this device.

# %%
for effect in findings.method_effects(study):
    print(f"{effect.name} {effect.verdict}: {'; '.join(effect.told)}")

# %% [markdown]
# ## How sure are we?
#
# The interval of the speedup is of the clock's noise, that of the loss is of the prompts. Held-out
# prompts, which the search never saw, have the last word.

# %%
if best is not None:
    for what, told in findings.sureness(study, best):
        print(f"{what}: {told}")

# %% [markdown]
# ## Where did the time go?

# %%
figures.search_time(study).show()

# %% [markdown]
# ## What would the next budget buy?
#
# Stored scores are judged anew by other budgets: nothing is measured. Settings over today's budget
# may not have been scored to the end, and faster ones were not looked for, so that a larger budget
# may buy more than this says.

# %%
if budget.floor_db is None:
    values = [budget.max_loss * factor for factor in (0.5, 1.0, 1.5, 2.0, 3.0)]
    key, what = "max_loss", f"{budget.metric} loss under {{:g}}"
else:
    values = [budget.floor_db + change for change in (2.0, 0.0, -2.0, -4.0)]
    key, what = "floor_db", "PSNR of {:g} dB"


def fastest_within(changed):
    """The fastest measured setting that keeps all budgets, of which the first is changed."""
    budgets = (changed, *configuration.budgets[1:])
    kept = []
    for one in study.current:
        if one.measurement is None or not one.measurement.scores or is_unconfirmed(study, one):
            continue
        judgement = judge(one.measurement.scores, budgets, configuration.images)
        if judgement is not None and judgement.verdict is Verdict.WITHIN:
            kept.append(one)
    return max(kept, key=lambda one: one.speedup, default=None)


for value in values:
    found = fastest_within(budget.model_copy(update={key: value}))
    speedup = "nothing measured" if found is None else f"{found.speedup:.2f}x"
    print(f"{what.format(value)}: {speedup}")
