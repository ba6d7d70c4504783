#!/usr/bin/env bash
# Download and unpack the documentation and dictionaries that corpus.py reads. Installs nothing.
# Usage: examples/reproduce/get_packages.sh FOLDER
# Needs a Debian or Ubuntu machine that reaches its package registries: apt-get, dpkg, pip.
set -euo pipefail
folder=${1:?usage: get_packages.sh FOLDER}
debian=(linux-doc-6.1 openjdk-17-doc rust-doc anarchism python3.11-doc postgresql-doc-15 perl-doc sqlite3-doc debian-handbook
        git-doc debian-policy developers-reference
        dict-gcide dict-wn dict-foldoc dict-jargon)

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
