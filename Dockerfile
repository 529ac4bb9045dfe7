# syntax=docker/dockerfile:1
# Build:    docker build -t clipia-receiver .
# Migrate:  docker run --rm --env-file .env clipia-receiver migrate
# Serve:    docker run -p 8000:8000 --env-file .env clipia-receiver
# Work:     docker run --env-file .env clipia-receiver worker

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/receiver
WORKDIR /src
COPY requirements.txt ./
RUN /opt/receiver/bin/pip install --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY receiver ./receiver
COPY migrations ./migrations
RUN /opt/receiver/bin/pip install --no-deps .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/receiver --create-home receiver
COPY --from=build /opt/receiver /opt/receiver
ENV PATH=/opt/receiver/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /var/lib/receiver
USER receiver
VOLUME /var/lib/receiver
EXPOSE 8000
# Liveness only: a container must not be restarted because its database is away. Route by /readyz.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["receiver"]
CMD ["serve", "--host", "0.0.0.0"]
