#!/bin/sh
# Talk to a running server from a shell: sh examples/curl.sh [URL] [KEY]
set -eu
url=${1:-http://127.0.0.1:9990}
key=${2:-none}

post() { # PATH BODY
  curl -sSN "$url$1" -H "Authorization: Bearer $key" -H "Content-Type: application/json" -d "$2"
  echo
}

curl -sS "$url/health"
echo
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 40}'
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 5, "stream": true}'
post /v1/completions '{"prompt": "This module provides", "max_tokens": 20, "temperature": 0, "logprobs": 2}'
post /v1/messages '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 40}'
post /tokenize '{"content": "Say hello."}'
