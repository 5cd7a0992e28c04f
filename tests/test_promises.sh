#!/bin/sh
# promises.md: every test and every command that it names exists, and mutants.tsv has a reason in
# every line.
. ./lib.sh
missing=
for name in $(grep -o '`test_[a-z0-9_]*`' promises.md | tr -d '`' | sort -u); do
  grep -q "RUN($name)" */*.c || grep -q -w -e "$name" test_*.sh || missing="$missing $name"
done
# names that scripts make of others: test_sanitizers_KIND_PART and the like
[ -z "$missing" ] && ok test_promises_names_tests_that_exist ||
  fail test_promises_names_tests_that_exist "there is no$missing"
missing=
for name in $(grep -o '`make -C tests [a-z]*' promises.md | awk '{ print $4 }' | sort -u); do
  grep -q -E "^$name:|\.PHONY:.* $name( |$)" Makefile || ls */"$name".c > /dev/null 2>&1 ||
    [ -e "test_$name.sh" ] || missing="$missing $name"
done
[ -z "$missing" ] && ok test_promises_names_commands_that_exist ||
  fail test_promises_names_commands_that_exist "there is no$missing"
if [ -s mutants.tsv ]; then
  bad=$(awk -F '\t' 'NF != 5 || $1 !~ /^(equivalent|elsewhere)$/ || length($2) < 10 {
    print FNR ": " $0
  }' mutants.tsv)
  [ -z "$bad" ] && ok test_promises_equivalent_faults_have_reasons ||
    fail test_promises_equivalent_faults_have_reasons "$bad"
else fail test_promises_equivalent_faults_have_reasons "mutants.tsv is empty"; fi
finish
