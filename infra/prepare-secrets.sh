#!/bin/sh
# Passwords and certificates for compose.yaml, made once; what is there stays. Names under which other machines reach
# the scheduler are given as arguments: ./prepare-secrets.sh render-1.studio 10.0.0.7
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets

# URL-safe, and not ended by a newline that a program might take for a part of it.
new_secret() {
    python3 -c 'import secrets; print(secrets.token_urlsafe(32), end="")'
}

[ -s secrets/postgres_password ] || new_secret >secrets/postgres_password
if [ ! -s secrets/prefect_auth ]; then
    { printf 'scail:' && new_secret; } >secrets/prefect_auth
fi
if [ ! -s secrets/certificates/ca.key ]; then
    set -- scheduler "$@"
    for host in "$@"; do
        shift
        set -- "$@" --host "$host"
    done
    scail certificates secrets/certificates "$@"
fi
echo "the UI's user and password: $(cat secrets/prefect_auth)"
