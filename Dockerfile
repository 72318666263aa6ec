# opacus_ac on a machine without a GPU. Data, runs and the downloaded model stay in the folder that is mounted.
#     docker build -t opacus_ac .
#     docker run --rm -v "$PWD:/runs" opacus_ac finetune --demo
#     docker run --rm -it -v "$PWD:/runs" opacus_ac chat demo
FROM python:3.12-slim

RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir "/src[lm,tensorboard]" && rm -r /src

RUN useradd --create-home --uid 1000 user
USER user
ENV OPACUS_AC_CACHE=/runs/.opacus_ac
WORKDIR /runs
ENTRYPOINT ["opacus-ac"]
