#!/bin/sh
# Secrets come as files, and programs read variables: NAME_FILE=/run/secrets/x gives NAME what the file holds.
# An environment is shown by `docker inspect` and by every error tracker; a file is not.
set -eu

for name in PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING PREFECT_SERVER_DATABASE_PASSWORD \
    SCAIL_WEBHOOK_SECRET; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        if [ ! -r "$file" ]; then
            echo "entrypoint: ${name}_FILE is $file, which cannot be read by uid $(id -u)" >&2
            exit 2
        fi
        value=$(cat "$file")
        export "$name=$value"
    fi
done

exec "$@"
