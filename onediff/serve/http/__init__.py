"""The HTTP server of `onediff serve`: read app.py first, which has the addresses, then service.py, which answers them.

    app.py       the addresses              service.py   loads versions, captions pairs of different clients together
    schemas.py   the bodies as JSON         batching.py  the queue of waiting pairs
    uploads.py   reads bodies of requests   limits.py    counts what the requests in progress hold
    pictures.py  bytes become images        errors.py    one shape for all errors
    chat.py      OpenAI's protocol          chat_request.py   the bodies of this protocol
    metrics.py   figures for Prometheus     server.py    uvicorn: the socket, the start and the end
    page/        the web page                web_page.py  the address of the page
"""
