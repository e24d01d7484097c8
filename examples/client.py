"""Talk to a running server with OpenAI's package: pip install openai; python examples/client.py [URL] [KEY]

The server: mpiexec -n 2 python -m dllama_mpi serve --model DIR
"""

from __future__ import annotations

import sys

import openai


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:9990"
    key = sys.argv[2] if len(sys.argv) > 2 else "none"  # the package wants one, whether the server does or not
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        model = client.models.list().data[0].id
        print("model:", model)
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Say hello."}],
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            elif chunk.usage is not None:
                print(f"\n{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out")


if __name__ == "__main__":
    main()
