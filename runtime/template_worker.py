"""The program that renders a chat template, in a process of its own: template_process.py starts it and says why.

It imports nothing of the package, so that it is there quickly. A frame is 8 bytes of length, then the data. The first
one is the template's source, each later one the variables of a rendering as JSON; an answer is OK or REFUSED and text.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

CPU_SECONDS = 2.0
MEMORY_BYTES = 512 << 20
LONGEST_PROMPT = 32 << 20

OK, REFUSED = b"+", b"-"


def main(requests: IO[bytes], answers: IO[bytes], cpu_seconds: float) -> None:
    """Answers until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: Template | None = None
    while (data := read_frame(requests)) is not None:
        # Whoever uses it up is ended by the signal, in the middle of whatever it does.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            if template is None:
                template = compile_template(data.decode("utf-8", "surrogatepass"))
                text = ""
            else:
                text = render(template, json.loads(data))
            answer = OK + text.encode()
        except Exception as error:
            answer = REFUSED + _reason(error).encode("utf-8", "replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(answers, answer)


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame's data; None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    data = stream.read(size)
    return data if len(data) == size else None


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """Sends `data`."""
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def compile_template(source: str) -> Template:
    """The template in the environment that transformers gives it. Raises what Jinja raises."""
    template: Template = _environment().from_string(source)
    return template


def render(template: Template, variables: dict[str, Any]) -> str:
    """What the template makes of its variables. Raises ValueError before that is absurdly long."""
    text: list[str] = []
    length = 0
    for piece in template.generate(variables):
        text.append(piece)
        if (length := length + len(piece)) > LONGEST_PROMPT:
            raise ValueError(f"it makes a prompt of over {LONGEST_PROMPT} characters")
    return "".join(text)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    if isinstance(error, UnicodeEncodeError):
        return "it makes half a surrogate pair, which is no text"
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
    return str(error).strip().rstrip(".")[:500] or type(error).__name__


def _environment() -> Any:
    import jinja2.ext
    from jinja2 import nodes, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said, for training; its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    @pass_context
    def unchanged(context: Any, value: Any) -> Any:
        return value

    # Compiling computes nothing: a template may hold 9 ** 9 ** 9. What wants the context cannot be folded either.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        optimized=False,
        finalize=unchanged,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    # Its own directory is not on the path, as inspect.py there is not Python's; the starter's is, for Jinja.
    sys.path[:] = sys.argv[2:]
    main(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
