# One image for every role: `ingest`, `sink`, `migrate`, `demo`, … behind its name. Builders that want the very same base each
# time add its digest: node:24-trixie-slim@sha256:…
ARG NODE=node:24-trixie-slim
# What fetches the packages. Where npm needs a certificate or a registry of its own: an image from NODE that has them.
ARG BUILDER=${NODE}

FROM ${BUILDER} AS build
WORKDIR /app
COPY package.json package-lock.json ./
# No package here needs its install script; ours would build before the sources are there.
RUN npm ci --ignore-scripts --no-audit --no-fund
COPY tsconfig.json tsconfig.build.json ./
COPY migrations migrations
COPY client client
COPY shared shared
COPY ingest ingest
COPY sink sink
COPY cli cli
RUN npx tsc -p tsconfig.build.json && \
    chmod 755 dist/cli/calltape.js && \
    npm pack --ignore-scripts --silent && \
    tar -xzf calltape-*.tgz
# In package/ there is now what package.json's `files` lists.

FROM ${BUILDER} AS dependencies
WORKDIR /app
COPY package.json package-lock.json ./
# Optional is PostgreSQL for `calltape up` on a laptop. The WebSocket server comes with a build for every platform and Node: one stays.
RUN npm ci --omit=dev --omit=optional --ignore-scripts --no-audit --no-fund && \
    build=$(node -p '`uws_${process.platform}_${process.arch}_${process.versions.modules}.node`') && \
    test -f "node_modules/uWebSockets.js/$build" && \
    find node_modules/uWebSockets.js -name '*.node' ! -name "$build" -delete

FROM ${NODE}
LABEL org.opencontainers.image.title="calltape" \
      org.opencontainers.image.description="Keeps every turn of every phone call: WebSocket and webhook events into Redis Streams, and from there into PostgreSQL within milliseconds."
RUN apt-get update && \
    apt-get install -y --no-install-recommends tini && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt/* /var/log/dpkg.log && \
    install -d -o 1000 -g 1000 /spool /archive && \
    ln -s /app/dist/cli/calltape.js /usr/local/bin/calltape
ENV NODE_ENV=production
WORKDIR /app
COPY --from=dependencies /app/node_modules node_modules
COPY --from=build /app/package ./
# The user `node`, as a number: who may only run what is not root can tell.
USER 1000:1000
# Where ingest and the sinks listen unless told otherwise.
EXPOSE 8080 9464
# Is the process alive? What cannot do its job just now, because a store is away, must not be killed for it: --ready asks that.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["calltape", "health"]
# Passes signals on, and reaps.
ENTRYPOINT ["tini", "--", "calltape"]
CMD ["--help"]
