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
