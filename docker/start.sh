#!/bin/sh
# Makes what the containers need once (passwords, Prometheus' key), then starts them: docker/start.sh cpu|cuda|vllm
set -eu
cd "$(dirname "$0")"
case "${1:-}" in
    cpu | cuda | vllm) profile=$1 ;;
    *) echo "usage: $0 cpu|cuda|vllm" >&2; exit 2 ;;
esac
mkdir -p secrets
chmod 0700 secrets
if [ ! -s secrets/grafana_password ]; then
    head -c 24 /dev/urandom | base64 > secrets/grafana_password
fi
[ -e secrets/hf_token ] || : > secrets/hf_token
if [ ! -s secrets/metrics_key ]; then
    # Its own service only; the containers of monitoring need the key that is made here.
    keys() {
        docker compose --profile "$profile" run --rm --no-deps "rigserve-$profile" \
            keys "$1" prometheus --config /etc/rigserve/rig.yaml --json > secrets/metrics_key.json
    }
    # Where the volume has that key already, and its secret is lost, it gets another.
    keys create || keys rotate
    sed -n 's/.*"secret": "\(.*\)".*/\1/p' secrets/metrics_key.json | tr -d '\n' > secrets/metrics_key
    rm secrets/metrics_key.json
fi
# Those who read them are users of their own; the folder lets nobody else in.
chmod 0644 secrets/hf_token secrets/metrics_key secrets/grafana_password
docker compose --profile "$profile" --profile monitoring up --detach --build
