"""Read by `inspect eval` in .venv-clients: a task of two questions, scored by match."""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def capitals() -> Task:
    questions = {"France": "Paris", "Italy": "Rome"}
    return Task(
        dataset=[
            Sample(input=f"Say the name of the capital of {country}.", target=city)
            for country, city in questions.items()
        ],
        solver=[generate()],
        scorer=match(location="any"),
    )
