"""The HTTP server of `onediff serve`: read app.py first, which has the addresses, then service.py, which answers them.

    app.py       the addresses                    service.py       answers requests, and follows the champion
    schemas.py   the bodies as JSON               batching.py      the queue of waiting pairs
    uploads.py   reads the bodies of requests     captioning.py    captions the pairs of a batch
    pictures.py  bytes become images              limits.py        counts what the requests in progress hold
    errors.py    one shape for all errors         metrics.py       figures for Prometheus
    chat.py      OpenAI's protocol                chat_request.py  the bodies of this protocol
    web_page.py  the page `/`, files in page/     api_docs.py      the page `/docs`
    server.py    uvicorn: the start and the end     connections.py   ends the connections of slow clients
    port.py      opens the port
"""
