# The page in a container, for a machine with an NVIDIA GPU; docs/app.md has the commands. Not built by us so far.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 app && mkdir /outputs /models && chown app /outputs /models

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY persam_dreambooth persam_dreambooth
RUN pip install --no-cache-dir -c constraints.txt ".[app,quantize,heic,optimizers]"

USER app
WORKDIR /home/app
ENV HF_HOME=/models
VOLUME ["/outputs", "/models"]
EXPOSE 7860
CMD exec persam-dreambooth app --no_browser --listen --workspace /outputs
