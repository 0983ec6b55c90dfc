"""A doctor for models with adapters: what trains, what is frozen, what is wrong.

Source: peft's troubleshooting guide; the checks are this course's own.
Taught in: notebook 10, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import pandas as pd
from torch import nn

from .patient import Patient, dtype_of, kind_of, look_at, size_of
from .sizes import Count, count
from .symptoms import CHECKS, SEVERITIES, Finding


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    ``parts``: one row for each part of the model that trains or is frozen, with the number of
    tensors, of parameters, and the dtypes. ``findings``: sorted, the gravest first.
    """

    count: Count
    adapters: dict[str, str]
    active: list[str]
    parts: pd.DataFrame
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """True when there is no error and no warning."""
        return all(finding.severity == "info" for finding in self.findings)

    def table(self) -> pd.DataFrame:
        """The findings, one a row: severity, what, fix."""
        rows = [(f.severity, f.what, f.fix) for f in self.findings]
        return pd.DataFrame(rows, columns=["severity", "what", "fix"])

    def _headline(self) -> str:
        names = ", ".join(
            f"{name} ({kind}{', active' if name in self.active else ''})"
            for name, kind in self.adapters.items()
        )
        return f"{self.count}. Adapters: {names or 'none'}."

    def __str__(self) -> str:
        lines = [self._headline(), "", self.parts.to_string(index=False), ""]
        lines += [f"{f.severity}: {f.what}\n  fix: {f.fix}" for f in self.findings]
        return "\n".join(lines if self.findings else [*lines, "Nothing to report."])

    def _repr_html_(self) -> str:
        findings = (
            self.table().to_html(index=False) if self.findings else "<p>Nothing to report.</p>"
        )
        return f"<p>{escape(self._headline())}</p>{self.parts.to_html(index=False)}{findings}"


def inspect(model: nn.Module) -> Report:
    """Look at a model before training it or saving it, with or without an adapter.

    Reports what trains and what is frozen; targets and modules to save that were asked for and
    not found; mixed dtypes; parameters that train and would be lost by ``save_pretrained``; a
    second wrapping by ``get_peft_model`` and what it left over; trainable weights in quantised
    storage; adapters that are inactive, disabled or merged; a head that stays at its random
    start; gradient checkpointing that cuts off the gradient or drops a prefix. The model is left
    as it is.

    Source: peft's page "Troubleshooting". Taught in: notebook 01, section 2.
    """
    patient = look_at(model)
    findings = [finding for check in CHECKS for finding in check(patient)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(
        count=count(model),
        adapters={n: kind_of(c) for n, c in patient.configs.items()},
        active=patient.active,
        parts=_parts(patient),
        findings=findings,
    )


def _parts(patient: Patient) -> pd.DataFrame:
    rows = [
        (p.part, p.adapter, p.tensor.requires_grad, size_of(p.tensor), dtype_of(p.tensor))
        for p in patient.parameters
    ]
    frame = pd.DataFrame(rows, columns=["part", "adapter", "trains", "parameters", "dtype"])
    groups = frame.groupby(["part", "adapter", "trains"], sort=False)
    table = groups.agg(
        tensors=("parameters", "size"),
        parameters=("parameters", "sum"),
        dtypes=("dtype", lambda names: ", ".join(sorted(set(names)))),
    ).reset_index()
    return table.sort_values(["trains", "part"], ascending=[False, True], ignore_index=True)
