#!/bin/sh
# curl, the command: `with_curl.sh URL TOPIC`. It shows what comes; it has no way to send a message in text and to
# close with a code. It prints the lines that tests/interop/python/steps.py describes.
set -u
curl=${CURL:-curl}
url=$1

echo "version $("$curl" --version | sed -n '1s/^curl \([^ ]*\).*/\1/p')"

# The welcome is all that comes: curl is ended by its timeout (28).
welcome=$("$curl" --silent --show-error --no-buffer --max-time 2 --header 'Sec-WebSocket-Protocol: wsbroker.v1' \
    "$url" 2>&1)
case $welcome in
    '{"op":"welcome","version":1,'*) echo "ok connect" ;;
    *) echo "failed connect: $(printf %s "$welcome" | tr '\n' ' ')" ;;
esac
