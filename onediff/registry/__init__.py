"""The model registry: the versions of the registered model `onediff`, their aliases, and the log of alias changes.

    versions.py    register, score again, list            rules.py        the promotion rules of mlflow/promotion.yaml
    promotion.py   propose, promote, rollback             audit_trail.py  the records that decide the aliases
    evidence.py    which scores belong to which model     facts.py        data validation, leak audit, clean lineage
    artifacts.py   the files of a version                 retention.py    runs and files that may be removed
    description.py the text that MLflow's page shows      store.py        lookups in MLflow, the lock for alias changes
"""

from onediff.registry.artifacts import (
    model_folder,
    scored_pairs,
    version_files,
    version_scores,
    version_tags,
    version_text,
)
from onediff.registry.audit_trail import check_trail, difference, repair, trail
from onediff.registry.evidence import Evidence, evidence_of, pipeline_evidence
from onediff.registry.promotion import assess, champion_to_score_again, promote, propose, rollback
from onediff.registry.rules import RULES, PromotionCase, Verdict, load_rules
from onediff.registry.store import CHAMPION, NAME, shared, sole_writer
from onediff.registry.versions import list_versions, register, rescore, version_with

__all__ = ["CHAMPION", "NAME", "RULES", "Evidence", "PromotionCase", "Verdict", "assess", "champion_to_score_again",
           "check_trail", "difference", "evidence_of", "list_versions", "load_rules", "model_folder",
           "pipeline_evidence", "promote", "propose", "register", "repair", "rescore", "rollback", "scored_pairs",
           "shared", "sole_writer", "trail", "version_files", "version_scores", "version_tags", "version_text",
           "version_with"]
