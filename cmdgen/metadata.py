"""A request as JSON: a line of a batch file, the metadata of a clip. Never imports torch."""

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from cmdgen.options import check_text, options_of, read_value
from cmdgen.request import Plan, Request

FIELDS = options_of(Request)
JOB_FIELDS = frozenset(name for name, described in FIELDS.items() if described.per_job)
# fields that name files, which metadata identifies by name and SHA-256
INPUT_FIELDS = ("content_from", "motion_from", "image")


def read_json(name: str, value: Any) -> Any:
    """Return the typed value of one field of a request in JSON, which is untrusted.

    JSON types are strict: a number is not text; null is the default. Raises ValueError.
    """
    described = FIELDS[name]
    if value is None:
        return described.default
    # of the values that are read from text, only a number of steps may be a number
    is_text = described.kind in (str, Path) or described.read is not None
    if is_text and not isinstance(value, str) and (type(value), name) != (int, "rehash"):
        raise ValueError(f"{name} {short(value)} is not text")
    if described.kind is float and not isinstance(value, int | float):
        raise ValueError(f"{name} {short(value)} is not a number")
    return read_value(described, check_text(name, value) if isinstance(value, str) else value)


def read_job(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the typed values of one line of a batch file by field name.

    Raises ValueError for unknown keys, options that hold for all jobs, and wrong values.
    """
    typed: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in typed:
            raise ValueError(f"{short(key)} is given twice")
        if name in FIELDS and name not in JOB_FIELDS:
            raise ValueError(f"{short(key)} is the same for all jobs: give it as a flag")
        if name not in FIELDS:
            raise ValueError(f"{short(key)} is not one of {', '.join(sorted(JOB_FIELDS))}")
        if value is None:
            raise ValueError(f"{short(key)} is null: leave it out")
        typed[name] = read_json(name, value)
    return typed


def describe_plan(plan: Plan, *, content: bool = True, motion: bool = True) -> dict[str, Any]:
    """Return a plan as metadata: a value for each field of `Request`, as JSON or as its text.

    Leaves out the settings of a part that is not sampled, as the motion of a still.
    """
    model, steps = plan.model, plan.key_steps
    values = vars(model) | vars(plan) | {"size": model.size}
    if steps is not None:
        values["rehash"] = (steps.content if content else (), steps.motion if motion else ())
        values |= {"rehash_policy": steps.policy, "rehash_threshold": steps.threshold}
    unused = set() if content else {"content_seed", "steps", "guidance"}
    if not (motion and plan.samples_motion):
        unused |= {"motion_seed", "motion_steps", "motion_guidance"}
    if model.looks_along_time:
        unused.add("content_seed")
    return {
        name: values[name] if described.read is None else described.write(values[name])
        for name, described in FIELDS.items()
        if name not in {*unused, "model"} and values.get(name) is not None
    }
