# syntax=docker/dockerfile:1
# Build:    docker build -t clipia-receiver .
# Migrate:  docker run --rm --env-file .env clipia-receiver migrate
# Serve:    docker run -p 8000:8000 --env-file .env clipia-receiver
# Work:     docker run --env-file .env clipia-receiver worker

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/build && python -m venv /opt/receiver
WORKDIR /src
COPY requirements.txt requirements-build.txt ./
RUN /opt/build/bin/python -m pip install --require-hashes -r requirements-build.txt \
    && /opt/receiver/bin/python -m pip install --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY receiver ./receiver
COPY migrations ./migrations
RUN /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/receiver/bin/python -m pip install --no-deps dist/*.whl

FROM python:3.13-slim
COPY --from=build /opt/receiver /opt/receiver
ENV PATH=/opt/receiver/bin:$PATH PYTHONUNBUFFERED=1
# Compile all bytecode: the base image ships its library without it, and this user may not write any.
# Group 0 has the owner's rights: platforms such as OpenShift choose any uid, but always this group.
RUN python -m compileall -q "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" /opt/receiver \
    && useradd --no-log-init --uid 10001 --gid 0 --no-create-home --home-dir /var/lib/receiver receiver \
    && mkdir -p /var/lib/receiver && chown 10001:0 /var/lib/receiver && chmod u=rwx,g=u,o= /var/lib/receiver
WORKDIR /var/lib/receiver
# A number: if it were a name, Kubernetes could not check that it is not root (runAsNonRoot).
USER 10001
VOLUME /var/lib/receiver
EXPOSE 8000
# Liveness only: if the database is away, the container must not be restarted. Route by /readyz.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["receiver", "healthcheck"]
ENTRYPOINT ["receiver"]
CMD ["serve", "--host", "0.0.0.0"]
