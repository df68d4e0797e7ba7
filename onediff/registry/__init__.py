"""The registered model `onediff`: its versions, which of them is champion, and the trail of every change.

    versions.py   register, score again, list            rules.py       mlflow/promotion.yaml
    promotion.py  propose, promote, rollback             comparison.py  the candidate against the champion
    records.py    the trail: the records that decide     facts.py       data validated, leak audit, lineage
    evidence.py   which scores belong to which model     scores.py      score files, read strictly
    artifacts.py  the files of a version                 writers.py     one writer at a time
    retention.py  what housekeeping may remove           store.py       names, and MLflow's failures in one line
    commits.py    what git has committed
"""

from onediff.registry.artifacts import model_folder, pinned, scored_pairs, version_files, version_tags, version_text
from onediff.registry.evidence import Evidence, evidence_of, pipeline_evidence
from onediff.registry.promotion import assess, champion_to_score_again, promote, propose, rollback
from onediff.registry.rules import RULES, Case, Rules, Verdict, load_rules
from onediff.registry.store import AUDIT, CANDIDATE, CHAMPION, CHAMPION_URI, NAME, PREVIOUS
from onediff.registry.trail import Change, check_trail, difference, repair, trail
from onediff.registry.versions import list_versions, register, rescore, version_with
from onediff.registry.writer_lock import shared, sole_writer

__all__ = ["AUDIT", "CANDIDATE", "CHAMPION", "CHAMPION_URI", "NAME", "PREVIOUS", "RULES", "Case", "Change", "Evidence",
           "Rules", "Verdict", "assess", "champion_to_score_again", "check_trail", "difference", "evidence_of",
           "list_versions", "load_rules", "model_folder", "pinned", "pipeline_evidence", "promote", "propose",
           "register", "repair", "rescore", "rollback", "scored_pairs", "shared", "sole_writer", "trail",
           "version_files", "version_tags", "version_text", "version_with"]
