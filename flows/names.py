"""Names of flow runs in Prefect's page, in place of Prefect's random names such as "gleaming-mammoth"."""

from datetime import date

from prefect.runtime import flow_run


def dated_name() -> str:
    """Return the name of the current flow run: the flow, the model version in its parameters if any, and the date."""
    subjects = (flow_run.parameters.get(name) for name in ("model", "version", "candidate"))
    subject = next((str(value) for value in subjects if value), "")
    return " ".join(filter(None, [flow_run.flow_name, subject, f"{date.today():%Y-%m-%d}"]))
