"""The registered model `onediff`: its versions, which of them is champion, and the trail of every change.

    versions.py   register, score again, list            rules.py        mlflow/promotion.yaml, and what it decides
    promotion.py  propose, promote, rollback             audit_trail.py  the records that decide what the aliases are
    evidence.py   which scores belong to which model     facts.py        data validated, leak audit, lineage
    artifacts.py  the files of a version                 retention.py    what housekeeping may remove
    store.py      names in MLflow, one writer at a time
"""

from onediff.registry.artifacts import model_folder, scored_pairs, version_files, version_tags, version_text
from onediff.registry.audit_trail import check_trail, difference, repair, trail
from onediff.registry.evidence import Evidence, evidence_of, pipeline_evidence
from onediff.registry.promotion import assess, champion_to_score_again, promote, propose, rollback
from onediff.registry.rules import RULES, PromotionCase, Verdict, load_rules
from onediff.registry.store import CHAMPION, NAME, shared, sole_writer
from onediff.registry.versions import list_versions, register, rescore, version_with

__all__ = ["CHAMPION", "NAME", "RULES", "Evidence", "PromotionCase", "Verdict", "assess", "champion_to_score_again",
           "check_trail", "difference", "evidence_of", "list_versions", "load_rules", "model_folder",
           "pipeline_evidence", "promote", "propose", "register", "repair", "rescore", "rollback", "scored_pairs",
           "shared", "sole_writer", "trail", "version_files", "version_tags", "version_text", "version_with"]
