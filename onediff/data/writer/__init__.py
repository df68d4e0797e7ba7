"""The writer: a language model behind an OpenAI-compatible endpoint that writes captions and edit instructions.

Read the modules in this order: request.py (one request, its key and its price), jobs.py (the requests that a source
needs), answers.py (what an answer contains and where answers are stored), endpoint.py (how a request is sent),
asking.py (sends all requests within the budget) and dry_run.py (shows requests and costs without sending anything).
"""
