"""The writer: a language model behind an OpenAI-compatible endpoint writes captions and edit instructions.

In reading order: request.py (one request, its key and its price), jobs.py (the requests of a source), answers.py (what
an answer holds and where answers are stored), endpoint.py (how a request is sent), asking.py (all of it together),
dry_run.py.
"""
