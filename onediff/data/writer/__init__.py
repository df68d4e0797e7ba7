"""The writer: a language model behind an OpenAI-compatible endpoint writes captions and edit instructions.

In reading order: jobs.py (what a source asks), request.py (one request and its key), endpoint.py (how it is sent),
answer.py (what came back), store.py (where answers are kept), cost.py (what they cost), asking.py (all of it together),
plan.py (the dry run).
"""
