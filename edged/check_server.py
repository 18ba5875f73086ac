"""Whether the server that answers for a slot is there, takes the key and has the model."""

from __future__ import annotations

from edged.config_server import Server
from edged.core.address import BadEndpoint
from edged.findings import Finding

SHOWN_MAX = 10  # models named in a finding


def finding(title: str, server: Server) -> Finding:
    """Ask the server for its models: no question, nothing of anybody's leaves the device."""
    from edged.engines.endpoint import EndpointError
    from edged.engines.openai import KeyRefused, served
    from edged.engines.openai_wire import BadAnswer

    try:
        found = served(server)
    except BadEndpoint as error:
        return Finding(title, "error", f"server {server.who}: {error}", "mend the file or variable that is named")
    except EndpointError as error:
        fix = "start it, or correct url, ca or the network's rules: until then questions wait with those who asked"
        return Finding(title, "error", f"server {server.who} does not answer: {error}", fix)
    except KeyRefused as error:
        return Finding(title, "error", f"server {server.who}: {error}", "put the key that it takes into api_key_file")
    except BadAnswer as error:
        fix = "correct url (it often ends in /v1), unless this server lists no models: then ask it with `edged infer`"
        return Finding(title, "warning", f"server {server.who} was not to be looked at: {error}", fix)
    if server.model not in found:
        text = f"server {server.who} does not name the model {server.model!r}; it has {', '.join(found[:SHOWN_MAX])}"
        return Finding(title, "warning", text, "correct model, unless the server serves what it does not list")
    return Finding(title, "ok", f"server {server.who} answers and has {server.model}")
