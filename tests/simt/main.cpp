// simt_<op> SEED CASE ...: runs each case, writes CASE.out, and prints the names of the kernels that ran.
#include <stdio.h>

#include "../../kernels/common/device.cuh"
#include "case.h"

int main(int argc, char** argv) {
  try {
    for (int i = 2; i < argc; ++i) {
      simt::set_seed(strtoull(argv[1], nullptr, 10));
      Case c(argv[i]);
      run_case(c);
      c.write(std::string(argv[i]) + ".out");
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  fputs(simt::kernels_that_ran().c_str(), stdout);
  return 0;
}
