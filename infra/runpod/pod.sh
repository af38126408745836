#!/bin/sh
# A worker on a RunPod pod. Certificates come as secrets in variables, since a pod mounts no secret files; the worker
# listens on the port that the template exposes, and tells the scheduler where RunPod maps it to.
set -eu
umask 077

mkdir -p "$SCAIL_TLS_DIR"
printf '%s\n' "$SCAIL_TLS_CA" >"$SCAIL_TLS_DIR/ca.pem"
printf '%s\n' "$SCAIL_TLS_CERTIFICATE" >"$SCAIL_TLS_DIR/node.pem"
printf '%s\n' "$SCAIL_TLS_KEY" >"$SCAIL_TLS_DIR/node.key"
unset SCAIL_TLS_CA SCAIL_TLS_CERTIFICATE SCAIL_TLS_KEY

if [ -z "${RUNPOD_PUBLIC_IP:-}" ] || [ -z "${RUNPOD_TCP_PORT_9000:-}" ]; then
    echo "pod: RunPod gave no public address for port 9000; the template exposes 9000/tcp" >&2
    exit 2
fi
exec scail worker --port 9000 --contact-address "tls://$RUNPOD_PUBLIC_IP:$RUNPOD_TCP_PORT_9000"
