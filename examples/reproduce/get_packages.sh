#!/usr/bin/env bash
# Download and unpack the documentation and dictionaries that corpus.py reads. Installs nothing.
# Usage: examples/reproduce/get_packages.sh FOLDER
# Needs a Debian or Ubuntu machine that reaches its package registries: apt-get, dpkg, pip.
set -euo pipefail
folder=${1:?usage: get_packages.sh FOLDER}
debian=(anarchism apache2-doc debian-handbook erlang-doc libreoffice-help-en-us linux-doc-6.1 nodejs-doc octave-doc
        openjdk-17-doc perl-doc python-django-doc python-pandas-doc python-sqlalchemy-doc python3.11-doc qtbase5-doc-html
        racket-doc rust-doc sqlite3-doc vim-doc dict-gcide
        postgresql-doc-15 git-doc debian-policy developers-reference dict-foldoc dict-jargon)

mkdir -p "$folder/archives"
recorded=$(cd "$(dirname "$0")/../.." && pwd)/docs/results/evidence/packages.sha256
cd "$folder/archives"
for package in "${debian[@]}"; do
  compgen -G "${package}_*.deb" > /dev/null || apt-get download "$package"
  if [ ! -d "../$package" ]; then
    rm -rf "../$package.partial"
    dpkg -x "${package}"_*.deb "../$package.partial"
    mv "../$package.partial" "../$package"
  fi
done
compgen -G 'botocore-*.whl' > /dev/null || python3 -m pip download --quiet --no-deps botocore
mkdir -p ../botocore
cp botocore-*.whl ../botocore/
sha256sum -- *.deb *.whl > ../SHA256SUMS
echo "unpacked $((${#debian[@]} + 1)) packages under $folder; checksums in $folder/SHA256SUMS"
if [ -f "$recorded" ] && others=$(comm -13 <(sort "$recorded") <(sort ../SHA256SUMS) | awk '{print $2}') && [ -n "$others" ]; then
  echo "note: not the packages of docs/evidence.md, so the results of both cannot be joined; 'apt-get update' may help:" >&2
  echo "$others" >&2
fi
